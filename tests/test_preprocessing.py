import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import image_segmentation_preprocessing as preprocessing
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Cityscapes

from unetseg.classes import CLASS_SETS
from unetseg.data import load_split

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "preprocessing" / "image_segmentation_preprocessing.py"


def run(raw, out, *options):
    command = [
        "--data_dir",
        raw,
        "--output_dir",
        out,
        "--workers",
        2,
        "--log_level",
        "ERROR",
        "--sample_size",
        1,
        *options,
    ]
    return preprocessing.main([str(part) for part in command])


def stats(out, split="train"):
    return json.loads((out / f"stats_{split}.json").read_text())


def files_of(raw, split="train"):
    images = sorted((raw / "leftImg8bit" / split).glob("*/*.png"))
    labels = sorted((raw / "gtFine" / split).glob("*/*_labelIds.png"))
    return images, labels


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_masks_are_sampled_at_pixel_centres():
    ramp = np.add.outer(np.arange(32) * 10 % 251, np.arange(64)).astype(np.uint8)
    small = preprocessing.shrink_mask(ramp, (8, 8))
    assert small[0, 0] == ramp[2, 4] and small[7, 7] == ramp[30, 60]
    assert (small == cv2.resize(ramp, (8, 8), interpolation=cv2.INTER_NEAREST_EXACT)).all()
    for size in ((5, 7), (13, 9), (64, 32)):  # within half a source pixel of the centre, whatever the ratio
        xs = preprocessing.shrink_mask(np.tile(np.arange(64, dtype=np.uint8), (32, 1)), size)[0].astype(float)
        centre = (np.arange(size[0]) + 0.5) * 64 / size[0]
        assert (abs(xs + 0.5 - centre) <= 0.5 + 1e-9).all()


def test_images_shrink_by_area_averaging():
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    mean = image.reshape(8, 4, 8, 8, 3).mean(axis=(1, 3))
    assert abs(preprocessing.shrink_image(image, (8, 8)) - mean).max() <= 0.5


def test_every_dtype_gives_the_same_k_back(raw, tmp_path):
    stored = {}
    for dtype in ("float32", "float16", "uint8"):
        assert run(raw, tmp_path / dtype, "--dtype", dtype, "--size", "32", "--splits", "val") == 0
        path = sorted((tmp_path / dtype / "images_processed" / "val").glob("*.npy"))[0]
        stored[dtype] = np.load(path, allow_pickle=False)
        assert stored[dtype].dtype == dtype and stored[dtype].shape == (32, 32, 3)
    k = stored["uint8"]
    assert (stored["float32"] == k / np.float32(255)).all()
    assert (np.rint(stored["float16"].astype(np.float32) * 255) == k).all()


def test_real_frames_pixel_by_pixel(cityscapes_sample, tmp_path):
    assert run(cityscapes_sample, tmp_path) == 0
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
    assert run(camvid, tmp_path, "--size", "64") == 0
    assert (stats(tmp_path)["num_images"], stats(tmp_path, "val")["num_images"]) == (367, 101)
    assert stats(tmp_path)["class_set"] == "camvid7" and not (tmp_path / "stats_test.json").exists()


def test_published_totals_of_cityscapes(tmp_path):
    root = os.environ.get("CITYSCAPES_ROOT")
    if not root:
        pytest.skip("needs the whole of Cityscapes: set CITYSCAPES_ROOT")
    assert run(root, tmp_path) == 0
    published = {
        "train": [1306362141, 2036416525, 1260636120, 459059194, 74789586, 879783988, 221979646],
        "val": [224209172, 345264442, 201005428, 74574583, 13889020, 158868008, 30765347],
    }
    for split, expected in published.items():
        *classes, void = stats(tmp_path, split)["pixels"]["full_resolution"].values()
        assert [classes[0] + void, *classes[1:]] == expected


def test_stats_add_up_and_pictures_are_drawn(raw, processed):
    found = stats(processed)
    assert sum(found["pixels"]["full_resolution"].values()) == 6 * 256 * 128
    assert sum(found["pixels"]["resized"].values()) == 6 * 64 * 32
    per_file = np.sum([entry["resized"] for entry in found["files"].values()], axis=0)
    assert per_file.tolist() == list(found["pixels"]["resized"].values())
    pictures = {path.name for path in (processed / "visualizations").iterdir()}
    assert pictures == {f"{s}_{kind}" for s in ("train", "val") for kind in ("samples.jpg", "class_distribution.png")}


def test_a_rerun_redoes_only_what_is_missing_or_differs(raw, tmp_path, capsys):
    assert run(raw, tmp_path, "--size", "32") == 0
    whole = tree(tmp_path)
    stems = sorted(stats(tmp_path)["files"])
    (tmp_path / "images_processed" / "train" / f"{stems[0]}.npy").unlink()
    (tmp_path / "masks_processed" / "train" / f"{stems[1]}.png").unlink()
    assert run(raw, tmp_path, "--size", "32", "--log_level", "INFO") == 0
    said = capsys.readouterr().err
    assert "train: 2 images made, 4 skipped" in said and "val: 0 images made, 4 skipped" in said
    assert tree(tmp_path) == whole
    assert run(raw, tmp_path, "--size", "16", "--log_level", "INFO") == 0
    assert "train: 6 images made, 0 skipped" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_a_changed_source_is_redone(raw, tmp_path, capsys):
    shutil.copytree(raw, tmp_path / "raw")
    assert run(tmp_path / "raw", tmp_path / "out", "--size", "32") == 0
    path = files_of(tmp_path / "raw")[1][0]
    Image.fromarray(np.full((128, 256), 7, np.uint8)).save(path)
    assert run(tmp_path / "raw", tmp_path / "out", "--size", "32", "--log_level", "INFO") == 0
    assert "train: 1 images made, 5 skipped" in capsys.readouterr().err


def damage_truncated(images, labels):
    images[0].write_bytes(images[0].read_bytes()[:-2000])
    return images[0], "truncated|broken|whole PNG"


def damage_bits(images, labels):
    content = bytearray(images[0].read_bytes())
    content[len(content) // 2] ^= 0xFF
    images[0].write_bytes(content)
    return images[0], "whole PNG"


def damage_empty(images, labels):
    labels[0].write_bytes(b"")
    return labels[0], "whole PNG.*0 bytes"


def damage_missing_label(images, labels):
    labels[0].unlink()
    return images[0], "expected its label file .*labelIds.png, found none"


def damage_missing_image(images, labels):
    images[0].unlink()
    return labels[0], "expected an image of the same name"


def damage_size(images, labels):
    Image.fromarray(np.full((64, 128), 7, np.uint8)).save(labels[0])
    return labels[0], "expected the image's size 256x128, found 128x64"


def damage_id(images, labels):
    Image.fromarray(np.full((128, 256), 77, np.uint8)).save(labels[0])
    return labels[0], r"expected label ids 0..33, found \[77\]"


def damage_train_ids(images, labels):
    Image.fromarray(np.full((128, 256), 255, np.uint8)).save(labels[0])
    return labels[0], "are these trainIds"


def damage_train_ids_by_name(images, labels):
    labels[0].rename(str(labels[0]).replace("labelIds", "labelTrainIds"))
    return images[0], "found labelTrainIds"


def damage_colour_mask(images, labels):
    Image.fromarray(np.zeros((128, 256, 3), np.uint8)).save(labels[0])
    return labels[0], "single-channel ids .*found mode RGB"


def damage_palette(images, labels):
    Image.fromarray(np.full((128, 256), 7, np.uint8)).convert("P").save(labels[0])
    return labels[0], "found mode P"


def damage_alpha(images, labels):
    Image.fromarray(np.zeros((128, 256, 4), np.uint8)).save(images[0])
    return images[0], "8-bit RGB .*found mode RGBA"


def damage_jpeg(images, labels):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((128, 256, 3), np.uint8)).save(buffer, "JPEG")
    images[0].write_bytes(buffer.getvalue())
    return images[0], "whole PNG"


def damage_transparency(images, labels):
    Image.fromarray(np.zeros((128, 256, 3), np.uint8)).save(images[0], transparency=(0, 0, 0))
    return images[0], "found mode RGB with transparency"


def damage_16_bit(images, labels):
    cv2.imwrite(str(images[0]), np.zeros((128, 256, 3), np.uint16))
    return images[0], "8-bit RGB .*found mode 16-bit RGB"


def damage_4_bit_labels(images, labels):
    content = bytearray(labels[0].read_bytes())
    content[24] = 4
    labels[0].write_bytes(content)
    return labels[0], "4-bit|whole PNG"


def damage_label_upper_case_orphan(images, labels):
    images[0].unlink()
    labels[0].rename(labels[0].with_suffix(".PNG"))
    return labels[0].with_suffix(".PNG"), "expected an image of the same name"


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__[7:])
def test_a_bad_file_is_named_and_the_rest_is_done(damage, raw, tmp_path, capsys):
    shutil.copytree(raw, tmp_path / "raw")
    culprit, message = damage(*files_of(tmp_path / "raw"))
    assert run(tmp_path / "raw", tmp_path / "out", "--size", "32") == 1
    left_out = stats(tmp_path / "out")["left_out"]
    assert len(left_out) == 1 and str(culprit) in next(iter(left_out.values()))
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert str(culprit) in said and "Traceback" not in said
    assert stats(tmp_path / "out")["num_images"] == 5 and stats(tmp_path / "out", "val")["num_images"] == 4


def test_an_image_is_refused_wherever_it_is_cut(raw, tmp_path):
    content = files_of(raw)[0][0].read_bytes()
    for length in [*range(60), *range(60, len(content), len(content) // 40)]:
        (tmp_path / "cut.png").write_bytes(content[:length])
        with pytest.raises(preprocessing.BadFile, match=r"cut.png: expected a whole PNG"):
            preprocessing.read_png(tmp_path / "cut.png", "RGB")


def test_what_became_unusable_leaves_the_processed_folder(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    assert run(tmp_path / "raw", tmp_path / "out", "--size", "32") == 0
    damage_truncated(*files_of(tmp_path / "raw"))
    assert run(tmp_path / "raw", tmp_path / "out", "--size", "32") == 1
    assert len(load_split(tmp_path / "out", "train")) == 5


def test_an_empty_file_in_the_output_is_made_anew(raw, tmp_path):
    assert run(raw, tmp_path, "--size", "32") == 0
    for path in (next(tmp_path.glob("images_processed/train/*")), next(tmp_path.glob("masks_processed/val/*"))):
        path.write_bytes(b"")
    assert run(raw, tmp_path, "--size", "32") == 0
    assert len(load_split(tmp_path, "train")) == 6


def test_a_split_without_labels_is_named_image_by_image_and_the_others_are_done(raw, tmp_path, capsys):
    shutil.copytree(raw, tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw" / "gtFine" / "val")
    (tmp_path / "raw" / "gtFine" / "test").mkdir()
    assert run(tmp_path / "raw", tmp_path / "out", "--size", "32", "--splits", "test", "val", "train") == 1
    said = capsys.readouterr().err
    assert "in the split test, found none" in said and said.count("expected its label file") == 4
    assert stats(tmp_path / "out")["num_images"] == 6


def test_a_fixed_file_is_taken_in_by_the_next_run(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    images, labels = files_of(tmp_path / "raw")
    whole = images[0].read_bytes()
    damage_truncated(images, labels)
    assert run(tmp_path / "raw", tmp_path / "out", "--size", "32") == 1
    images[0].write_bytes(whole)
    assert run(tmp_path / "raw", tmp_path / "out", "--size", "32") == 0
    assert stats(tmp_path / "out")["num_images"] == 6 and not stats(tmp_path / "out")["left_out"]


@pytest.mark.parametrize("options, message", [
    (["--data_dir", "nowhere"], "found nothing"),
    (["--data_dir", "empty"], "expected leftImg8bit/ and gtFine/"),
    (["--data_dir", "above"], "did you mean"),
    (["--splits", "train", "nosuch"], "expected the splits .*nosuch"),
    (["--classes", "camvid11"], "expected a class set for cityscapes"),
])  # fmt: skip
def test_wrong_roots_and_options_say_what_was_expected(options, message, raw, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(raw, tmp_path / "above" / "cityscapes")
    assert run(raw, tmp_path / "out", *options) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said


@pytest.mark.parametrize(
    "options",
    [["--size", "0"], ["--size", "axb"], ["--workers", "0"], ["--sample_size", "-1"], ["--dtype", "int8"], []],
)
def test_usage_errors_exit_with_2(options, raw, tmp_path):
    command = ["--data_dir", str(raw), *(["--output_dir", str(tmp_path)] if options else []), *options]
    with pytest.raises(SystemExit) as stop:
        preprocessing.main(command)
    assert stop.value.code == 2


def test_cityscapes_test_split_is_images_only(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(raw / "leftImg8bit" / "val", tmp_path / "raw" / "leftImg8bit" / "test")
    out = tmp_path / "out"
    assert run(tmp_path / "raw", out, "--splits", "test", "--size", "32") == 0
    assert len(list((out / "images_processed" / "test").glob("*.npy"))) == 4
    assert not (out / "masks_processed" / "test").exists() and stats(out, "test")["num_images"] == 4


def test_a_full_disk_is_reported_per_file(raw, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    pairs, _ = preprocessing.list_pairs(raw, "cityscapes", "train")
    settings = preprocessing.Settings("cityscapes7", (32, 32), "float32")
    monkeypatch.setattr(preprocessing.np, "save", full)
    record = preprocessing.process(pairs[0], "train", tmp_path, settings, False)
    assert "No space left" in record.error
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_script_runs_without_torch(raw, tmp_path):
    arguments = ["--data_dir", str(raw), "--output_dir", str(tmp_path / "out")]
    code = f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv[1:] = {arguments}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 images made" in done.stderr
