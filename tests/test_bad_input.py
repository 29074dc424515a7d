"""Bad input as users have it: a clear error that names the file, or it is handled.

Never a traceback, silent acceptance, a hang, code that runs, or a file outside the output folder.
"""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, command, process
from PIL import Image

from unetseg import checkpoint
from unetseg.data import load_split
from unetseg.files import UserError, read_json

WIDTH, HEIGHT = 96, 64
IMAGE, LABELS = (HEIGHT, WIDTH, 3), (HEIGHT, WIDTH)
RNG = np.random.default_rng(0)


def png(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def ids(*shape, low=0, high=34):
    return RNG.integers(low, high, shape, dtype=np.uint8)


def declares(width, height, colour=2):
    """A PNG of a few bytes, with sound checksums, that says it is huge."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    packed = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def cut(share):
    return lambda content: content[: int(share * len(content)) if share < 1 else share]


def jpeg(mode, size=(WIDTH, HEIGHT)):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "JPEG")
    return buffer.getvalue()


def sixteen_bit(*shape):
    return cv2.imencode(".png", np.full(shape, 999, np.uint16))[1].tobytes()


TRAIN_IDS = np.where(ids(*LABELS) > 18, 255, 3).astype(np.uint8)
# kind: what the message must say, and the cases: which file, and its new content, or what is done to the old
RAW = {
    "cut": (
        "complete PNG",
        [("image", cut(4)), ("labels", cut(20)), ("image", cut(0.5)), ("labels", lambda c: c[:-5])],
    ),
    "zero bytes": ("complete PNG", [("image", cut(0.0)), ("labels", cut(0.0)), ("image", lambda c: bytes(len(c)))]),
    "wrong sizes": ("the image's size", [("labels", png(ids(HEIGHT, 32))), ("image", png(noise(8, 8, 3)))]),
    "1 bit": ("found one channel", [("image", png(ids(*LABELS) > 9)), ("image", png(ids(*LABELS)))]),
    "16 bits": ("found mode 16-bit", [("image", sixteen_bit(*IMAGE)), ("labels", sixteen_bit(*LABELS))]),
    "alpha": ("found mode", [("image", png(noise(*LABELS, 4))), ("labels", png(noise(*LABELS, 2)))]),
    "colours": ("single-channel ids .*found mode RGB", [("labels", png(noise(*IMAGE)))]),
    "transparency": ("RGB with transparency", [("image", png(np.zeros(IMAGE, np.uint8), transparency=(0, 0, 0)))]),
    "JPEG": (
        "found JPEG|found mode CMYK|complete PNG",
        [("image", jpeg("CMYK")), ("image", jpeg("RGB")[:-300]), ("labels", jpeg("L"))],
    ),
    "ids": (
        r"label ids 0..33, found \[",
        [("labels", png(ids(*LABELS, low=33, high=36))), ("labels", png(noise(*LABELS)))],
    ),
    "trainIds": ("are these trainIds", [("labels", png(TRAIN_IDS)), ("labels", png(np.full(LABELS, 255, np.uint8)))]),
    "huge": (
        "more than 178956970 pixels",
        [("image", declares(100_000, 100_000)), ("labels", declares(20_000, 20_000, 0))],
    ),
    "impossible": ("complete PNG", [("image", declares(2**31 - 1, 2**31 - 1)), ("image", declares(0, 5))]),
}


class Raw:
    """A folder in the Cityscapes layout, to which pairs are added one by one."""

    def __init__(self, root):
        self.root = root
        self.add("fine", city="one")
        self.add("fine_val", split="val")

    def add(self, stem, split="train", city="city", image=None, labels=None):
        paths = {}
        for which, folder, ending, content in (
            ("image", "leftImg8bit", "leftImg8bit", image or png(noise(*IMAGE))),
            ("labels", "gtFine", "gtFine_labelIds", labels or png(ids(*LABELS))),
        ):
            path = os.path.join(os.fsencode(self.root / folder / split / city), os.fsencode(f"{stem}_{ending}.png"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            paths[which] = Path(os.fsdecode(path))
            paths[which].write_bytes(content)
        return paths

    def run(self, out):
        return process(self.root, out, "--size", "32", "--sample_size", "0")


@pytest.fixture
def pairs(tmp_path):
    return Raw(tmp_path / "raw")


def test_each_kind_of_bad_picture_is_named_and_the_rest_is_done(pairs, tmp_path, capsys):
    cases = []
    for kind, (message, damages) in RAW.items():
        for number, (which, damage) in enumerate(damages):
            path = pairs.add(stem := f"{kind.replace(' ', '-')}-{number}")[which]
            path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
            cases.append((stem, path, message))
    assert pairs.run(tmp_path / "out") == 1
    left_out = read_json(tmp_path / "out" / "stats_train.json")["left_out"]
    for stem, path, message in cases:
        assert str(path) in left_out[stem] or message == "the image's size", stem
        assert re.search(message, left_out[stem]), (stem, left_out[stem])
    assert len(left_out) == len(cases) == 28
    assert "Traceback" not in capsys.readouterr().err
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 2


def test_what_is_no_regular_file_and_what_has_no_partner_is_named(pairs, tmp_path):
    cases = {}
    for kind in ("loop", "dangling", "folder", "fifo", "device"):
        path = cases[kind] = pairs.add(kind)["labels"]
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to({"loop": path, "dangling": "nowhere", "device": "/dev/zero"}[kind])
    (pairs.root / "leftImg8bit" / "train" / "up").symlink_to("..")  # a folder that leads in circles
    cases["orphan"] = pairs.add("orphan")["labels"]
    pairs.add("orphan")["image"].unlink()
    cases["alone"] = pairs.add("alone")["image"]
    pairs.add("alone")["labels"].rename(pairs.root / "gtFine" / "train" / "city" / "alone_gtFine_labelTrainIds.png")
    for city in ("a", "b"):
        cases["double"] = pairs.add("double", city=city)["image"]
    assert pairs.run(tmp_path / "out") == 1
    left_out = read_json(tmp_path / "out" / "stats_train.json")["left_out"]
    assert left_out.keys() == cases.keys()
    for stem, path in cases.items():
        assert str(path) in left_out[stem], left_out[stem]


NAMES = ["new\nline", "tab\tand\rreturn", "\udcff\udcfe", "a\udc80b", "..", "...", "-rf", "$(touch owned)"]
NAMES += ["`touch owned`", "; touch owned", "%s%n", "{0}", "'\"", "\x1b[2J", "né😀", "con", "x" * 200]


def test_any_name_is_handled_and_writes_nowhere_else(pairs, tmp_path):
    for name in NAMES:
        pairs.add(name)
        pairs.add(f"bad {name}", image=b"no picture")
    inside = set(os.listdir(tmp_path))
    for _ in range(2):
        assert pairs.run(tmp_path / "out") == 1
    stats = read_json(tmp_path / "out" / "stats_train.json")
    assert set(stats["files"]) == {*NAMES, "fine"} and len(stats["left_out"]) == len(NAMES)
    loaded = load_split(tmp_path / "out", "train")
    assert len(loaded) == len(NAMES) + 1 and len(loaded.split.sha256) == 64
    assert set(os.listdir(tmp_path)) == inside | {"out"}
    for path in (tmp_path / "out").rglob("*"):
        assert path.resolve().is_relative_to((tmp_path / "out").resolve())


class Payload:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_that_is_loaded_runs_code(pairs, processed, tmp_path, capsys):
    owned = tmp_path / "owned"
    assert pairs.run(tmp_path / "out") == 0
    np.save(tmp_path / "out" / "images_processed" / "train" / "fine.npy", np.array([Payload(owned)], object))
    with pytest.raises(UserError, match=r"fine.npy: expected an array that preprocessing wrote"):
        load_split(tmp_path / "out", "train")
    tiny = ["--data", processed, "--channels", "4", "--depth", "2", "--epochs", "1", "--out", tmp_path / "run"]
    assert command("train", "scratch", *tiny) == 0
    for content in (pickle.dumps(Payload(owned)), b"", b"\x80\x04."):
        for name in ("state.pt", "model.safetensors"):
            whole = (tmp_path / "run" / name).read_bytes()
            (tmp_path / "run" / name).write_bytes(content)
            (tmp_path / "run" / "history.csv").write_text("epoch\n")
            assert command("train", "scratch", *tiny) in (0, 1)
            (tmp_path / "run" / name).write_bytes(whole)
    buffer = io.BytesIO()
    torch.save({"format": 2, "model": Payload(owned)}, buffer)
    (tmp_path / "run" / "state.pt").write_bytes(buffer.getvalue())
    (tmp_path / "run" / "history.csv").unlink()
    assert command("train", "scratch", *tiny) == 1
    assert "Traceback" not in capsys.readouterr().err and not owned.exists()


@pytest.mark.parametrize("edit", [
    {"channels": "many"}, {"channels": 100_000}, {"depth": 99}, {"stage": "../../dragons"}, {"void": "maybe"},
    {"channels": 8}, {"classes": ["road"]}, None,
], ids=str)  # fmt: skip
def test_weights_with_other_metadata_than_they_fit_are_named(edit, tmp_path, capsys):
    given, path = ROOT / "weights" / "unet-drawn.safetensors", tmp_path / "model.safetensors"
    weights, facts = safetensors.torch.load_file(given), checkpoint.read_about(given)
    texts = None if edit is None else {"unetseg": json.dumps(facts | edit)}
    safetensors.torch.save_file(weights, path, texts)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    status = command("predict", path, tmp_path / "a.png", "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert status == 1 and f"error: {path}: expected weights" in said and "Traceback" not in said


def test_weights_that_are_not_finite_are_named(tmp_path):
    given, path = ROOT / "weights" / "unet-drawn.safetensors", tmp_path / "model.safetensors"
    weights, facts = safetensors.torch.load_file(given), checkpoint.read_about(given)
    weights["head.bias"][0] = float("nan")
    safetensors.torch.save_file(weights, path, {"unetseg": json.dumps(facts)})
    with pytest.raises(UserError, match="expected finite weights, found NaN"):
        checkpoint.load_model(path)


def test_each_kind_of_bad_photo_is_named(tmp_path, capsys):
    photos, whole = tmp_path / "photos", png(noise(*IMAGE))
    photos.mkdir()
    bad = {"cut0.png": whole[:20], "cut1.png": whole[: len(whole) // 2], "cut2.jpg": jpeg("RGB")[:90], "empty.png": b"",
           "text.jpg": b"hello", "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
           "16bit.png": sixteen_bit(*LABELS), "bomb.png": declares(60_000, 60_000)}  # fmt: skip
    for name, content in bad.items():
        (photos / name).write_bytes(content)
    (photos / "loop.png").symlink_to("loop.png")
    os.mkfifo(photos / "fifo.png")
    modes = ("RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr")
    for mode in modes:
        Image.new(mode, (40, 30)).save(photos / f"good {mode}\n.{'jpg' if mode in ('CMYK', 'YCbCr') else 'png'}")
    weights = ROOT / "weights" / "unet-drawn.safetensors"
    assert command("predict", weights, photos, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    for name in (*bad, "loop.png", "fifo.png"):
        assert f"{photos / name}: " in said, name
    assert "Traceback" not in said and len(list((tmp_path / "out" / "ids").glob("good*.png"))) == len(modes)


def test_opencv_without_a_display_says_which_wheel_to_install(tmp_path):
    """As on a machine without libGL: in every command that needs it, one line."""
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"}
    for arguments in (["doctor"], ["preprocess", "--data_dir", "x", "--output_dir", "y"]):
        asked = [sys.executable, "-m", "unetseg", *arguments]
        done = subprocess.run(asked, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and "pip install opencv-python-headless" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
