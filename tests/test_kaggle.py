"""The notebooks in a copy of Kaggle: its folders, environment and secrets; and the metadata to push them with."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import execute
import nbformat
import pytest
from conftest import ROOT, without_timings
from nbclient import NotebookClient

from unetseg import checkpoint, run
from unetseg.files import UserError, write_json
from unetseg.settings import Settings
from unetseg.tools import kaggle as place
from unetseg.tools import preprocess
from unetseg.train import Stopper

SECRETS = """
class UserSecretsClient:
    def get_secret(self, label):
        if label != "WANDB_API_KEY":
            raise Exception("No user secrets exist for kernel id 1 and label " + label)
        return "5ec7e7" * 6 + "0000"
"""
TINY = {"channels": 4, "depth": 2, "epochs": 1}
RUNS = ["scratch", "weighted_ce", "ce_dice"]


def code(target):
    """What a user uploads of this repository."""
    listed = subprocess.check_output(["git", "-C", ROOT, "ls-files", "unetseg"], text=True)
    for name in listed.splitlines():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)


def contents(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def make_read_only(folder):
    for path in [*folder.rglob("*"), folder]:
        path.chmod(path.stat().st_mode & 0o555)


@pytest.mark.parametrize("start", ["notebooks", ".", "beside"])
def test_the_first_cell_finds_the_library_at_home_and_on_colab(tmp_path, start):
    cells = [cell for cell in nbformat.read(ROOT / "notebooks" / execute.NOTEBOOKS["scratch"], 4).cells]
    first = next(cell.source for cell in cells if cell.cell_type == "code")
    home = tmp_path / "street-scenes"
    code(home)
    (home / "notebooks").mkdir()
    cwd = tmp_path if start == "beside" else home / start
    told = subprocess.check_output([sys.executable, "-c", f"{first}\nprint(root, os.getcwd())"], cwd=cwd, text=True)
    assert told.split() == [str(home), str(home)]
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    failed = subprocess.run([sys.executable, "-c", first], cwd=alone, capture_output=True, text=True)
    assert start == "beside" or "attach it as a dataset" in failed.stderr


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory, alone):
    """/kaggle with input and working, for as long as this module's tests take."""
    there, home = Path("/kaggle"), tmp_path_factory.mktemp("kaggle")
    if there.exists() or there.is_symlink() or not os.access("/", os.W_OK):
        pytest.skip("needs to make the folder /kaggle, and that there is none")
    (home / "input").mkdir()
    (home / "secrets").mkdir()
    (home / "secrets" / "kaggle_secrets.py").write_text(SECRETS)
    there.symlink_to(home)
    yield home
    there.unlink()
    subprocess.run(["chmod", "-R", "u+w", home], check=True)


def session(kaggle, name, monkeypatch, **settings):
    """Run a notebook as one Kaggle session; returns it, executed, and what its cells said."""
    shutil.rmtree(kaggle / "working", ignore_errors=True)
    (kaggle / "working").mkdir()
    before = contents(kaggle / "input")
    facts = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_URL_BASE": "https://www.kaggle.com"}
    facts |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "PYTHONPATH": str(kaggle / "secrets")}
    for key, value in facts.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    execute.change_settings(notebook, settings)
    place_of_it = {"metadata": {"path": "/kaggle/working"}}
    NotebookClient(notebook, timeout=300, resources=place_of_it, extra_arguments=["--log-level=ERROR"]).execute()
    assert contents(kaggle / "input") == before
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_the_three_notebooks_one_session_each(kaggle, raw, monkeypatch):
    """Code by the new kind of mount, raw data by the old one, then each notebook's output attached to the next."""
    code(kaggle / "input" / "datasets" / "someone" / "unetseg")
    shutil.copytree(raw, kaggle / "input" / "street-scenes")
    make_read_only(kaggle / "input")
    for stage in RUNS:
        own = TINY if stage == "scratch" else {"epochs": 1}
        said = session(kaggle, execute.NOTEBOOKS[stage], monkeypatch, **own)
        runs = kaggle / "working" / "runs"
        assert "the key comes from Kaggle's secrets" in said and "logging offline" in said
        if stage == "scratch":
            assert "made from /kaggle/input/street-scenes" in said and (runs / "processed").is_dir()
        else:
            assert "data: /kaggle/input/notebooks/me/scratch/runs/processed, attached" in said
            assert "runs/scratch: 1 epochs, copied from /kaggle/input/notebooks/me/scratch/runs/scratch" in said
            parent = checkpoint.weights_sha256(runs / "scratch")
            assert json.loads((runs / stage / "config.json").read_text())["init_sha256"] == parent
        names = {path.name for path in (runs / stage).iterdir()}
        assert names >= {"model.safetensors", "config.json", "history.csv", "state.pt", "results_test.json", "wandb"}
        assert (runs / "pictures").is_dir() and {path.name for path in (kaggle / "working").iterdir()} == {"runs"}
        (kaggle / "input").chmod(0o755)
        attached = kaggle / "input" / "notebooks" / "me" / stage
        shutil.copytree(kaggle / "working", attached, ignore_dangling_symlinks=True)
        make_read_only(kaggle / "input")
    assert all(run in said for run in RUNS)  # the last one compares all three


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "KAGGLE", tmp_path / "kaggle")
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    return tmp_path / "kaggle" / "input"


def attach(folder, epochs, **spoiled):
    """A run folder of ours with so many epochs of 9."""
    folder.mkdir(parents=True)
    config = {"format": checkpoint.FORMAT, "settings": {"stage": "scratch"}, "cycles": [9], "init_sha256": None}
    data = {name: {"sha256": ""} for name in ("train", "val")}
    config |= {"class_set": "c", "classes": [], "width": 8, "height": 8, "data": data}
    write_json(folder / "config.json", config | spoiled)
    (folder / "state.pt").write_text(str(epochs))
    checkpoint.write_history(folder, [{"epoch": n + 1} for n in range(epochs)])


def test_an_earlier_session_is_resumed(mounts, processed, tmp_path, monkeypatch):
    """The output of a session that ended in the second epoch, attached read-only: same end as without the break."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    facts = {"channels": 4, "depth": 2, "epochs": 2, "batch_size": 4, "precision": "fp32", "data": str(processed)}
    expected = run.train(Settings(out=tmp_path / "whole" / "scratch", **facts))
    first = Settings(out=mounts / "notebooks" / "me" / "unetseg" / "runs" / "scratch", **facts)
    with monkeypatch.context() as patch:
        weights = Path(first.out) / "model.safetensors"
        patch.setattr(Stopper, "reason", lambda self, reserve: "time" * weights.exists())
        assert len(run.train(first)) == 1
    make_read_only(mounts)
    again = place.prepare(Settings(out=tmp_path / "runs" / "scratch", **facts))
    assert without_timings(run.train(again)) == without_timings(expected)
    ids = [json.loads((Path(folder) / "wandb.json").read_text())["id"] for folder in (first.out, again.out)]
    assert ids[0] == ids[1]
    subprocess.run(["chmod", "-R", "u+w", mounts], check=True)


def test_of_several_earlier_sessions_the_one_that_came_furthest(mounts, tmp_path, capsys):
    for name, epochs in (("a", 3), ("b", 7), ("c", 5)):
        attach(mounts / "notebooks" / "me" / name / "runs" / "scratch", epochs)
    place.bring_runs(tmp_path / "runs")
    assert (tmp_path / "runs" / "scratch" / "state.pt").read_text() == "7"
    place.bring_runs(tmp_path / "runs")  # and what is there stays
    assert capsys.readouterr().out.count("copied from") == 1


def test_runs_keep_their_names_and_others_models_are_passed_over(mounts, tmp_path):
    """A seed's run, or a control of the same stage, is not taken for the first stage."""
    for name in ("seed1", "control"):
        attach(mounts / "notebooks" / "me" / "all" / "runs" / name, 0)
    for number, config in enumerate(("[]", '{"stage": ["scratch"]}', '{"format": 2}', "no JSON")):
        (mounts / f"model{number}").mkdir()
        (mounts / f"model{number}" / "model.safetensors").write_text("x")
        (mounts / f"model{number}" / "config.json").write_text(config)
    place.bring_runs(tmp_path / "runs")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["control", "seed1"]


def test_data_begun_in_an_earlier_session_are_finished(mounts, tmp_path, monkeypatch):
    monkeypatch.setattr(place, "DRAWN", {"train": 2, "val": 2})
    (tmp_path / "runs" / "processed" / ".unfinished" / "images_processed").mkdir(parents=True)
    assert place.find_data(tmp_path / "runs") == tmp_path / "runs" / "processed"
    assert (tmp_path / "runs" / "processed" / "stats_val.json").is_file()


def test_the_two_archives_of_cityscapes_side_by_side(mounts, raw, tmp_path, monkeypatch, capsys):
    for name in ("leftImg8bit", "gtFine"):
        shutil.copytree(raw / name, mounts / "cityscapes" / f"{name}_trainvaltest" / name)
    monkeypatch.setattr(preprocess, "main", lambda argv, data_set: print(len(data_set.pairs("train")[0]), "pairs"))
    for name in ("cityscapes", "moved"):  # the next session may attach them elsewhere
        place.find_data(tmp_path / name)
        assert "6 pairs" in capsys.readouterr().out
        if name == "cityscapes":
            shutil.move(mounts / name, mounts / "moved")


def test_pictures_in_an_unknown_layout_are_an_error_and_no_scenes_are_drawn(mounts, raw, tmp_path):
    code(mounts / "unetseg")
    (mounts / "unetseg" / "figure.png").touch()
    shutil.copytree(next((raw / "leftImg8bit" / "train").iterdir()), mounts / "datasets" / "me" / "camvid" / "frames")
    with pytest.raises(
        UserError, match=r"expected .* of docs/data.md; found .*camvid/frames/ with 6 files like drawn_.*, 256x128"
    ):
        place.find_data(tmp_path / "runs")


def test_one_archive_of_cityscapes_alone_is_no_reason_to_draw_scenes(mounts, raw, tmp_path):
    shutil.copytree(raw / "leftImg8bit", mounts / "datasets" / "me" / "cityscapes" / "leftImg8bit")
    with pytest.raises(UserError, match="expected gtFine/ with folders of splits, because both archives"):
        place.find_data(tmp_path / "runs")


def test_an_archive_is_to_be_unpacked_and_the_first_of_two_data_sets_taken(mounts, raw, tmp_path, capsys, monkeypatch):
    (mounts / "leftImg8bit_trainvaltest.zip").touch()
    said = r"leftImg8bit_trainvaltest.zip: expected folders of pictures, found an archive"
    with pytest.raises(UserError, match=said):
        place.find_data(tmp_path / "runs")
    for name in ("a", "b"):
        shutil.copytree(raw, mounts / name)
    monkeypatch.setattr(preprocess, "main", lambda argv, data_set: print("taken:", data_set.root))
    place.find_data(tmp_path / "runs")
    said = capsys.readouterr().out
    assert f"taken: {mounts / 'a'}" in said and f'write its folder as data="…": {mounts / "b"} (cityscapes)' in said
    assert place.find_data(tmp_path / "other", mounts / "b") == tmp_path / "other" / "processed"
    assert f"taken: {mounts / 'b'}" in capsys.readouterr().out


def test_half_processed_data_are_not_taken_for_whole(mounts, raw, processed, tmp_path, capsys):
    """The output of a session that ended in preprocessing, beside the raw data; then beside whole ones, two of them."""
    shutil.copytree(processed, mounts / "notebooks" / "me" / "all" / "runs" / "processed" / preprocess.UNFINISHED)
    shutil.copytree(raw, mounts / "datasets" / "me" / "scenes")
    assert place.find_data(tmp_path / "runs") == tmp_path / "runs" / "processed"
    assert "made from" in capsys.readouterr().out
    for name in ("a", "b"):
        shutil.copytree(processed, mounts / name)
    assert place.find_data(tmp_path / "other") == mounts / "a"
    assert f"attached (not used: {mounts / 'b'}, {mounts / 'datasets' / 'me' / 'scenes'})" in capsys.readouterr().out


def test_without_the_secret_runs_are_offline(mounts, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    place.take_key()
    assert "no secret WANDB_API_KEY (ModuleNotFoundError), logging offline" in capsys.readouterr().out
    assert "WANDB_API_KEY" not in os.environ


@pytest.mark.parametrize("folder", ["from_scratch", "weighted_ce", "ce_dice"])
def test_the_kaggle_package_accepts_the_metadata(folder, monkeypatch, tmp_path, capsys):
    """Its own checks, up to the call that would go to the server."""
    for name, value in (("KAGGLE_USERNAME", "USERNAME"), ("KAGGLE_KEY", "0" * 32), ("HOME", str(tmp_path))):
        monkeypatch.setenv(name, value)
    from kaggle.api.kaggle_api_extended import KaggleApi

    api, client = KaggleApi(), MagicMock()
    monkeypatch.setattr(api, "build_kaggle_client", client)
    save = client().__enter__().kernels.kernels_api_client.save_kernel
    save.return_value = None
    api.kernels_push(str(ROOT / "kaggle" / folder))
    request = save.call_args.args[0]
    assert "does not resolve" not in capsys.readouterr().out
    assert request.machine_shape == "NvidiaTeslaT4" and request.enable_gpu and request.enable_internet
    assert request.is_private and request.dataset_data_sources == ["USERNAME/unetseg", "USERNAME/street-scenes"]
    assert "run.train" in "".join(cell.source for cell in nbformat.reads(request.text, as_version=4).cells)
    slugs = {json.loads(path.read_text())["id"] for path in (ROOT / "kaggle").glob("*/*-metadata.json")}
    assert {*request.dataset_data_sources, *request.kernel_data_sources} <= slugs


def test_what_is_none_suits_what_was_found(processed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(place, "KAGGLE", tmp_path / "nowhere")
    settings = Settings("scratch", processed, tmp_path / "runs" / "scratch")
    drawn = place.prepare(settings)
    assert (drawn.epochs, drawn.channels, drawn.num_processes, drawn.max_minutes) == (60, 16, 1, None)
    assert "the quick schedule" in capsys.readouterr().out
    assert place.prepare(replace(settings, epochs=3, channels=8)) == replace(drawn, epochs=3, channels=8)
    monkeypatch.setattr(place.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(place, "find_split", lambda data, name: SimpleNamespace(checked=["aachen_000000_000019"]))
    real = place.prepare(settings)
    assert (real.epochs, real.channels, real.num_processes) == (300, None, 2)
    assert [place.full_epochs("scratch", number) for number in (367, 2975)] == [245, 100]


def test_a_fine_tuning_without_its_first_run_says_so_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "KAGGLE", tmp_path / "nowhere")
    monkeypatch.setattr(place, "find_data", lambda *arguments: pytest.fail("data were looked for"))
    with pytest.raises(UserError, match="expected trained weights, found nothing; train first"):
        place.prepare(Settings("ce_dice", "auto", tmp_path / "ce_dice", init=tmp_path / "scratch"))
