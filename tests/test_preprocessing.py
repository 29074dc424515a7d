"""Preprocessing: what is computed, what is refused, and that a processed split is one thing, whatever happens."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, process, tree
from PIL import Image
from torchvision.datasets import Cityscapes

from unetseg.classes import CLASS_SETS
from unetseg.data import load_split
from unetseg.files import UserError, read_json
from unetseg.images import shrink
from unetseg.tools import preprocess, scenes
from unetseg.tools.layouts import find_data

SCRIPT = ROOT / "preprocessing" / "image_segmentation_preprocessing.py"


def stats(out, split="train"):
    return read_json(out / f"stats_{split}.json")


def files_of(raw, split="train"):
    images = sorted((raw / "leftImg8bit" / split).glob("*/*.png"))
    labels = sorted((raw / "gtFine" / split).glob("*/*_labelIds.png"))
    return images, labels


@pytest.fixture
def source(raw, tmp_path):
    """A copy of the raw scenes that may be spoiled."""
    return shutil.copytree(raw, tmp_path / "raw")


# ---- what is computed


def test_masks_are_sampled_at_pixel_centres():
    ramp = np.add.outer(np.arange(32) * 10 % 251, np.arange(64)).astype(np.uint8)
    small = preprocess.shrink_mask(ramp, (8, 8))
    assert small[0, 0] == ramp[2, 4] and small[7, 7] == ramp[30, 60]
    assert (small == cv2.resize(ramp, (8, 8), interpolation=cv2.INTER_NEAREST_EXACT)).all()
    for size in ((5, 7), (13, 9), (64, 32)):  # within half a source pixel of the centre, whatever the ratio
        xs = preprocess.shrink_mask(np.tile(np.arange(64, dtype=np.uint8), (32, 1)), size)[0].astype(float)
        centre = (np.arange(size[0]) + 0.5) * 64 / size[0]
        assert (abs(xs + 0.5 - centre) <= 0.5 + 1e-9).all()


def test_images_shrink_by_area_averaging():
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    mean = image.reshape(8, 4, 8, 8, 3).mean(axis=(1, 3))
    assert abs(shrink(image, (8, 8)) - mean).max() <= 0.5


def test_real_frames_pixel_by_pixel(cityscapes_sample, tmp_path):
    assert process(cityscapes_sample, tmp_path) == 0
    dataset = Cityscapes(str(cityscapes_sample), split="train", mode="fine", target_type="semantic")
    class_set, total, compared = CLASS_SETS["cityscapes7"], np.zeros(8, int), 0
    for path, (image, labels) in zip(dataset.images, dataset):
        stem = Path(path).name.removesuffix("_leftImg8bit.png")
        ours = np.load(tmp_path / "images_processed" / "train" / f"{stem}.npy", allow_pickle=False)
        mean = np.asarray(image, float).reshape(256, 4, 256, 8, 3).mean(axis=(1, 3))
        assert ours.dtype == np.float32 and (ours == np.rint(mean).astype(np.float32) / np.float32(255)).all()
        classes = class_set.lookup[np.asarray(labels)]
        mask = np.asarray(Image.open(tmp_path / "masks_processed" / "train" / f"{stem}.png"))
        assert (mask == classes[2::4, 4::8]).all()
        total += np.bincount(np.where(classes == 255, 7, classes).ravel(), minlength=8)
        compared += 1
    assert compared == 8 == stats(tmp_path)["num_images"]
    assert list(stats(tmp_path)["pixels"]["full_resolution"].values()) == total.tolist()


def test_camvid(camvid, tmp_path):
    assert process(camvid, tmp_path, "--size", "64") == 0
    assert (stats(tmp_path)["num_images"], stats(tmp_path, "val")["num_images"]) == (367, 101)
    assert stats(tmp_path)["class_set"] == "camvid7" and not (tmp_path / "stats_test.json").exists()
    assert not stats(tmp_path, "val")["val_is_halved"] and len(load_split(tmp_path, "val")) == 101


def test_published_totals_of_cityscapes(tmp_path):
    root = os.environ.get("CITYSCAPES_ROOT")
    if not root:
        pytest.skip("needs the whole of Cityscapes: set CITYSCAPES_ROOT")
    assert process(root, tmp_path) == 0
    published = {
        "train": [1306362141, 2036416525, 1260636120, 459059194, 74789586, 879783988, 221979646],
        "val": [224209172, 345264442, 201005428, 74574583, 13889020, 158868008, 30765347],
    }
    for split, expected in published.items():
        *classes, void = stats(tmp_path, split)["pixels"]["full_resolution"].values()
        assert [classes[0] + void, *classes[1:]] == expected


def test_stats_add_up_and_pictures_are_drawn(processed):
    found = stats(processed)
    assert sum(found["pixels"]["full_resolution"].values()) == 6 * 256 * 128
    assert sum(found["pixels"]["resized"].values()) == 6 * 64 * 32
    per_file = np.sum([entry["resized"] for entry in found["files"].values()], axis=0)
    assert per_file.tolist() == list(found["pixels"]["resized"].values())
    assert found["classes"] == list(CLASS_SETS["cityscapes7"].names) and found["colours"][1] == [128, 64, 128]
    pictures = {path.name for path in (processed / "visualizations").iterdir()}
    assert pictures == {f"{s}_{kind}" for s in ("train", "val") for kind in ("samples.jpg", "class_distribution.png")}


def test_cityscapes_test_split_is_images_only(source, tmp_path):
    shutil.copytree(source / "leftImg8bit" / "val", source / "leftImg8bit" / "test")
    out = tmp_path / "out"
    for _ in range(2):
        assert process(source, out, "--splits", "test", "--size", "32") == 0
    assert len(list((out / "images_processed" / "test").glob("*.npy"))) == 4
    assert not list((out / "masks_processed" / "test").iterdir()) and stats(out, "test")["num_images"] == 4


def test_the_script_and_the_command_are_one_and_run_without_torch(raw, tmp_path):
    parts = ["--data_dir", str(raw), "--size", "32", "--output_dir"]
    code = f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv[1:] = {[*parts, str(tmp_path / "script")]}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "6 images made" in done.stderr, done.stderr
    command = ["preprocess", "--data-dir", str(raw), "--output-dir", str(tmp_path / "command"), "--size=32"]
    environment = os.environ | {"MPLBACKEND": "module://a_notebooks.backend"}
    assert subprocess.run([sys.executable, "-m", "unetseg", *command], env=environment).returncode == 0
    assert tree(tmp_path / "script") == tree(tmp_path / "command")


# ---- what is refused


@pytest.mark.parametrize("options, message", [
    (["--data_dir", "nowhere"], "found nothing"), (["--data_dir", "empty"], "expected leftImg8bit/ and gtFine/"),
    (["--splits", "train", "nosuch"], "expected the splits .*nosuch"),
    (["--classes", "camvid11"], "--classes: expected cityscapes7 or cityscapes19"),
])  # fmt: skip
def test_wrong_roots_and_options_say_what_was_expected(options, message, raw, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(raw, tmp_path / "above" / "cityscapes")
    assert process(raw, tmp_path / "out", *options) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1, said


USAGE = "", "--size 0", "--size axb", "--workers 0", "--workers 99999", "--sample_size -1", "--dtype int8"


@pytest.mark.parametrize("options", USAGE)
def test_usage_errors_exit_with_2(options, raw, tmp_path):
    command = ["--data_dir", str(raw), *(["--output_dir", str(tmp_path)] if options else []), *options.split()]
    with pytest.raises(SystemExit) as stop:
        preprocess.main(command)
    assert stop.value.code == 2


def test_a_split_without_labels_is_named_image_by_image_and_the_others_are_done(source, tmp_path, capsys):
    shutil.rmtree(source / "gtFine" / "val")
    (source / "gtFine" / "test").mkdir()
    assert process(source, tmp_path / "out", "--size", "32", "--splits", "test", "val", "train") == 1
    said = capsys.readouterr().err
    assert "in the split test, found none" in said and said.count("expected its label file") == 4
    assert stats(tmp_path / "out")["num_images"] == 6 and not (tmp_path / "out" / "stats_val.json").exists()


# ---- a processed split is one thing


def test_a_rerun_makes_only_what_is_missing_or_differs(raw, tmp_path, capsys):
    assert process(raw, tmp_path, "--size", "32") == 0
    whole, stems = tree(tmp_path), sorted(stats(tmp_path)["files"])
    (tmp_path / "images_processed" / "train" / f"{stems[0]}.npy").unlink()
    (tmp_path / "masks_processed" / "train" / f"{stems[1]}.png").write_bytes(b"")
    assert process(raw, tmp_path, "--size", "32", "--log_level", "INFO") == 0
    said = capsys.readouterr().err
    assert "train: 2 images made, 4 skipped" in said and "val: 0 images made, 4 skipped" in said
    assert tree(tmp_path) == whole
    assert process(raw, tmp_path, "--size", "16", "--log_level", "INFO") == 0
    assert "train: 6 images made, 0 skipped" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp") or ".unfinished" in str(path)]


def test_a_corrected_label_of_equal_size_and_time_is_made_anew(source, tmp_path, capsys):
    assert process(source, tmp_path / "out", "--size", "32") == 0
    path = files_of(source)[1][0]
    facts, content = path.stat(), bytearray(path.read_bytes())
    Image.fromarray(255 - np.array(Image.open(path)) % 3 - 248).save(path)  # other ids, all known
    corrected = path.read_bytes()
    path.write_bytes(corrected.ljust(len(content), b"\0")[: max(len(content), len(corrected))])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert process(source, tmp_path / "out", "--size", "32", "--log_level", "INFO") == 0
    assert "train: 1 images made, 5 skipped" in capsys.readouterr().err


def test_neither_file_times_nor_workers_change_a_byte(source, tmp_path):
    assert process(source, tmp_path / "a", "--size", "32", "--workers", "1") == 0
    for path in source.rglob("*.png"):
        os.utime(path, (1, 1))
    shutil.move(source, tmp_path / "moved")
    assert process(tmp_path / "moved", tmp_path / "b", "--size", "32", "--workers", "3") == 0
    assert process(tmp_path / "moved", tmp_path / "a", "--size", "32") == 0  # the same data in another place
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_what_became_unusable_leaves_the_split_and_comes_back_repaired(source, tmp_path):
    images, _ = files_of(source)
    whole = images[0].read_bytes()
    assert process(source, tmp_path / "out", "--size", "32") == 0
    images[0].write_bytes(whole[:-2000])
    assert process(source, tmp_path / "out", "--size", "32") == 1
    assert len(load_split(tmp_path / "out", "train")) == 5
    images[0].write_bytes(whole)
    assert process(source, tmp_path / "out", "--size", "32") == 0
    assert stats(tmp_path / "out")["num_images"] == 6 and not stats(tmp_path / "out")["left_out"]


def test_another_source_is_refused_and_nothing_is_touched(raw, tmp_path, capsys):
    out, another = tmp_path / "out", tmp_path / "another"
    scenes.draw_dataset(another, {"train": 3}, (256, 128), seed=9)
    assert process(raw, out, "--size", "32") == 0
    before = tree(out)
    for options in ([], ["--overwrite"], ["--size", "16"]):
        assert process(another, out, "--size", "32", *options) == 1
        assert "holds splits made from another source than" in capsys.readouterr().err
        assert tree(out) == before


def test_files_of_others_are_never_removed_or_replaced(raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert process(raw, out, "--size", "32", "--splits", "train") == 0
    mine = [out / "images_processed" / "train" / "notes.txt", out / "masks_processed" / "mine" / "a.png"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert process(raw, out, "--size", "16", "--splits", "train") == 0
    assert all(path.read_text() == "mine" for path in mine)
    stem = files_of(raw, "val")[0][0].name.removesuffix("_leftImg8bit.png")
    there = out / "images_processed" / "val" / f"{stem}.npy"
    there.parent.mkdir()
    there.write_text("mine")
    assert process(raw, out, "--size", "16") == 1
    assert "was not made by preprocessing; move it away" in capsys.readouterr().err and there.read_text() == "mine"


@pytest.mark.parametrize("name", ["images_processed", "masks_processed/train", "visualizations", ".unfinished"])
def test_a_link_into_another_folder_is_not_followed(raw, tmp_path, capsys, name):
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "users")
    assert process(raw, tmp_path / "out", "--size", "32") == 1 and not (tmp_path / "users").exists()
    assert "expected a folder of its own, found a link" in capsys.readouterr().err


def test_a_folder_of_another_version_is_refused(raw, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stats_train.json").write_text(json.dumps({"layout": "cityscapes", "files": {}}))
    assert process(raw, tmp_path / "out", "--size", "32") == 1
    assert "was written by another version of unetseg; run preprocessing into a new folder" in capsys.readouterr().err


def test_a_dead_worker_is_reported_and_the_next_run_continues(raw, tmp_path, monkeypatch, capsys):
    def broken(*args, **more):
        raise preprocess.BrokenProcessPool("as a test has it")

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "tqdm", broken)
        assert process(raw, tmp_path / "out") == 1
    assert "a worker process died (out of memory?); run again with fewer --workers" in capsys.readouterr().err
    assert process(raw, tmp_path / "out") == 0
    with pytest.raises(UserError):
        find_data(tmp_path / "out")
