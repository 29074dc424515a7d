import json
import socket
import warnings

import numpy as np
import pytest
import wandb

from unetseg import tracking
from unetseg.tracking import Tracker, choose_mode

NAMES = ("road", "person")
RECORD = {"epoch": 1, "lr": 1e-3, "images_per_second": 9.0, "train_loss": 1.0, "val_loss": 1.1, "val_miou": 0.4}
RECORD["scores"] = {"classes": {"road": {"iou": 0.6}, "person": {"iou": None}}}


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_without_a_key_the_run_is_offline(no_account):
    assert choose_mode() == "offline"


def test_an_explicit_mode_is_obeyed(no_account, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode() == "disabled"


def test_online_without_a_key_is_offline_instead_of_a_prompt(no_account, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode() == "offline"


def test_nonsense_in_the_environment_does_not_stop_training(no_account, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "bogus")
    with pytest.warns(UserWarning, match="start failed"):
        tracker = Tracker("test", tmp_path / "run", {"stage": "scratch"})
    tracker.epoch(RECORD)
    tracker.finish()


def test_a_key_but_no_server_is_offline_with_one_warning(no_account, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    with pytest.warns(UserWarning, match="does not answer") as caught:
        assert choose_mode() == "offline"
    assert len(caught) == 1 and "kkkk" not in str(caught[0].message)


def test_everything_is_logged_offline(no_account, tmp_path):
    run = tmp_path / "home" / "scratch"
    tracker = Tracker("test", run, {"stage": "scratch", "lr": 1e-3})
    tracker.epoch(RECORD)
    ids = np.stack([np.zeros((8, 8)), np.eye(8)]).astype(np.uint8)
    tracker.pictures(np.stack([ids * 255] * 3, axis=-1), ids, 1 - ids, NAMES)
    tracker.confusion(np.array([[5, 1], [2, 3]]), NAMES)
    (run / "model.safetensors").write_bytes(b"weights")
    tracker.model(run / "model.safetensors", {"stage": "scratch"})
    assert dict(tracker.wandb_run.config) == {"stage": "scratch", "lr": 1e-3}
    summary = dict(tracker.wandb_run.summary)
    tracker.finish()
    assert summary["val/iou/road"] == 0.6 and "val/iou/person" not in summary and summary["train/loss"] == 1.0
    (folder,) = (run / "wandb").glob("offline-run-*")
    media = [path.name for path in folder.rglob("*.*") if "media" in path.parts]
    assert sum(name.endswith(".jpg") for name in media) == 2 and sum(name.endswith(".mask.png") for name in media) == 4
    (table,) = folder.rglob("*.table.json")
    assert ["person", "road", 2] in json.loads(table.read_text())["data"]


def test_a_tracker_that_cannot_start_stops_nothing(no_account, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(tracking.wandb, "init", fail)
    with pytest.warns(UserWarning, match="start failed"):
        tracker = Tracker("test", tmp_path / "run", {"stage": "scratch"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.epoch(RECORD)
        tracker.pictures(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8)), np.zeros((1, 8, 8)), NAMES)
        tracker.confusion(np.eye(2), NAMES)
        tracker.model(tmp_path / "none", {"stage": "scratch"})
        tracker.finish()


def test_a_failure_while_logging_warns_once_and_falls_silent(no_account, tmp_path, monkeypatch):
    tracker = Tracker("test", tmp_path / "run", {"stage": "scratch"})

    class Broken:
        def log(self, values):
            raise OSError("disk full")

    started, tracker.wandb_run = tracker.wandb_run, Broken()
    with pytest.warns(UserWarning, match="disk full") as caught:
        tracker.epoch(RECORD)
        tracker.epoch(RECORD)
    assert len(caught) == 1
    started.finish()
