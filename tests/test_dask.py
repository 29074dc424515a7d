"""Preprocessing on a real local Dask cluster of two workers, one of which is killed in the middle."""

import os
import signal
import threading
import time

import dask
import pytest
from conftest import tree
from distributed import Client, LocalCluster

from unetseg.tools import preprocess, scenes


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def test_a_cluster_gives_the_same_bytes_though_a_worker_is_killed(cluster, tmp_path, monkeypatch):
    scenes.draw_dataset(tmp_path / "raw", {"train": 60, "val": 4}, (256, 128), seed=1)
    command = ["--data_dir", str(tmp_path / "raw"), "--size", "64x32", "--log_level", "ERROR"]
    assert preprocess.main([*command, "--output_dir", str(tmp_path / "here"), "--workers", "2"]) == 0
    with Client(cluster) as client:
        pids = list(client.run(os.getpid).values())
    done, killed = tmp_path / "there" / ".unfinished" / "masks_processed" / "train", []

    def kill_one_midway():
        while len(list(done.glob("*.png"))) < 10:
            time.sleep(0.002)
        os.kill(pids[0], signal.SIGKILL)
        killed.append(len(list(done.glob("*.png"))))

    killer = threading.Thread(target=kill_one_midway)
    killer.start()
    monkeypatch.chdir(tmp_path)  # where the workers are not
    there = ["--output_dir", "there", "--dask", cluster.scheduler_address]
    assert preprocess.main([*command, *there]) == 0
    killer.join(10)
    assert killed and killed[0] < 60  # it was in the middle
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_a_cluster_that_cannot_work_is_named(tmp_path, raw, capsys, monkeypatch):
    monkeypatch.setattr(preprocess, "DASK_PATIENCE", 1)
    command = ["--data_dir", str(raw), "--output_dir", str(tmp_path), "--dask"]
    with LocalCluster(n_workers=0, dashboard_address=None) as empty:
        assert preprocess.main([*command, empty.scheduler_address]) == 1
    assert "expected workers, found none in 1 s" in capsys.readouterr().err
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        assert preprocess.main([*command, "tcp://127.0.0.1:9"]) == preprocess.main([*command, "scheduler"]) == 1
    assert capsys.readouterr().err.count("expected a scheduler's address") == 2
