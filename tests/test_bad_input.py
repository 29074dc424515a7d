"""Every kind of bad input, at least three times each: a clear error that names the file, or it is handled.

Never a traceback, silent acceptance, a hang, code that runs, a file outside the output folder, or a gigabyte of memory.
"""

import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import cv2
import image_segmentation_preprocessing as preprocessing
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unetseg import checkpoint, data, inference, pictures, processed
from unetseg.__main__ import main

WIDTH, HEIGHT = 96, 64
ROOT = Path(__file__).resolve().parents[1]
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


def flip(share):
    def damage(content):
        content = bytearray(content)
        content[int(share * len(content))] ^= 0x10
        return bytes(content)

    return damage


def jpeg(mode, size=(WIDTH, HEIGHT)):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "JPEG")
    return buffer.getvalue()


def sixteen_bit(*shape):
    return cv2.imencode(".png", np.zeros(shape, np.uint16))[1].tobytes()


def palette():
    buffer = io.BytesIO()
    Image.fromarray(ids(HEIGHT, WIDTH)).convert("P").save(buffer, "PNG")
    return buffer.getvalue()


IMAGE, LABELS = (HEIGHT, WIDTH, 3), (HEIGHT, WIDTH)

# kind: what the message must say, and the cases: which file, and its new content, or what is done to the old
RAW = {
    "cut in the header": ("whole PNG", [("image", cut(4)), ("labels", cut(20)), ("image", cut(40))]),
    "cut in the middle": ("whole PNG", [("image", cut(0.3)), ("labels", cut(0.5)), ("image", cut(0.7))]),
    "cut at the tail": ("whole PNG", [("image", lambda c: c[:-1]), ("labels", lambda c: c[:-5]), ("image", lambda c: c[:-13])]),
    "flipped bits": ("whole PNG", [("image", flip(0.3)), ("labels", flip(0.5)), ("image", flip(0.8)), ("labels", flip(0.01))]),
    "zero bytes": ("whole PNG", [("image", cut(0.0)), ("labels", cut(0.0)), ("image", lambda c: bytes(len(c)))]),
    "wrong sizes": ("the image's size", [("labels", png(ids(HEIGHT, 32))), ("labels", png(ids(WIDTH, HEIGHT))), ("image", png(noise(8, 8, 3)))]),
    "palette": ("found mode P", [(which, palette()) for which in ("image", "labels", "image")]),
    "1 bit": ("found mode 1-bit", [("labels", png(ids(*LABELS) > 9)), ("image", png(ids(*LABELS) > 9)), ("labels", png(ids(*LABELS) > 99))]),
    "16 bits": ("found mode 16-bit", [("image", sixteen_bit(*IMAGE)), ("labels", sixteen_bit(*LABELS)), ("image", sixteen_bit(*LABELS))]),
    "alpha": ("found mode", [("image", png(noise(*LABELS, 4))), ("labels", png(noise(*LABELS, 4))), ("labels", png(noise(*LABELS, 2)))]),
    "JPEG": ("whole PNG", [("image", jpeg("CMYK")), ("image", jpeg("RGB")), ("labels", jpeg("L"))]),
    "ids out of range": (r"label ids 0..33, found \[", [("labels", png(ids(*LABELS, low=33, high=35))), ("labels", png(ids(*LABELS, low=100, high=101))), ("labels", png(noise(*LABELS)))]),
    "trainIds": ("are these trainIds", [("labels", png(np.where(ids(*LABELS) > 18, 255, 3).astype(np.uint8))), ("labels", png(np.full(LABELS, 255, np.uint8))), ("labels", png(np.where(ids(*LABELS) > 9, 0, 255).astype(np.uint8)))]),
    "declared huge": ("more than 33554432 pixels", [("image", declares(100_000, 100_000)), ("labels", declares(65_535, 65_535, 0)), ("image", declares(8_193, 8_192)), ("labels", declares(12_000, 12_000, 0))]),
    "declared huger than PNG allows": ("whole PNG", [("image", declares(2**31 - 1, 2**31 - 1)), ("image", declares(0, 5)), ("labels", declares(2**31 - 1, 1, 0))]),
}  # fmt: skip


class Raw:
    """A folder in the Cityscapes layout, to which pairs are added one by one."""

    def __init__(self, root):
        self.root = root
        self.add("fine", city="one")
        self.add("fine_val", split="val")

    def add(self, stem, split="train", city="city", image=None, labels=None):
        paths = []
        for folder, ending, content in (
            ("leftImg8bit", "leftImg8bit", image or png(noise(*IMAGE))),
            ("gtFine", "gtFine_labelIds", labels or png(ids(*LABELS))),
        ):
            path = os.path.join(os.fsencode(self.root / folder / split / city), os.fsencode(f"{stem}_{ending}.png"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(os.fsdecode(path)).write_bytes(content)
            paths.append(Path(os.fsdecode(path)))
        return dict(zip(("image", "labels"), paths))

    def run(self, out):
        return preprocess(self.root, out)


def preprocess(root, out):
    command = ["--data_dir", root, "--output_dir", out, "--size", "32", "--sample_size", "0"]
    return preprocessing.main([str(part) for part in (*command, "--workers", 2, "--log_level", "WARNING")])


@pytest.fixture
def pairs(tmp_path):
    return Raw(tmp_path / "raw")


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A processed folder that is as it should be."""
    root = tmp_path_factory.mktemp("clean")
    assert Raw(root / "raw").run(root / "processed") == 0
    return root / "processed"


def test_each_kind_of_bad_picture_is_named_and_the_rest_is_done(pairs, tmp_path, capsys):
    cases = []
    for kind, (message, damages) in RAW.items():
        assert len(damages) >= 3, kind
        for number, (which, damage) in enumerate(damages):
            stem = f"{kind.replace(' ', '-')}-{number}"
            path = pairs.add(stem)[which]
            path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
            cases.append((stem, path, message))
    assert pairs.run(tmp_path / "out") == 1
    left_out = json.loads((tmp_path / "out" / "stats_train.json").read_text())["left_out"]
    for stem, path, message in cases:
        assert str(path) in left_out[stem] or message == "the image's size", stem
        assert re.search(message, left_out[stem]), (stem, left_out[stem])
    assert len(left_out) == len(cases) == 47
    assert "Traceback" not in capsys.readouterr().err
    assert len(list((tmp_path / "out").rglob("*.npy"))) == 2


def test_what_is_no_regular_file_is_named(pairs, tmp_path):
    cases = {}
    for number in range(3):
        which = ("image", "labels")[number % 2]
        for kind in ("loop", "dangling", "folder", "fifo", "device"):
            stem = f"{kind}{number}"
            path = cases[stem] = pairs.add(stem)[which]
            path.unlink()
            if kind == "folder":
                path.mkdir()
            elif kind == "fifo":
                os.mkfifo(path)
            else:
                path.symlink_to({"loop": path, "dangling": "nowhere", "device": "/dev/zero"}[kind])
    for name in ("loop", "up", "self"):  # folders that lead in circles
        (pairs.root / "leftImg8bit" / "train" / name).symlink_to({"loop": "loop", "up": "..", "self": "."}[name])
    assert pairs.run(tmp_path / "out") == 1
    left_out = json.loads((tmp_path / "out" / "stats_train.json").read_text())["left_out"]
    assert left_out.keys() >= cases.keys()
    for stem, path in cases.items():
        assert str(path) in left_out[stem], left_out[stem]


def test_orphans_doubles_and_swapped_files_are_named(pairs, tmp_path):
    for number, which in enumerate(("image", "labels", "image")):
        pairs.add(f"orphan{number}")[which].unlink()
        for city in ("a", "b"):
            pairs.add(f"double{number}", city=city)
        pair = pairs.add(f"swapped{number}")
        contents = [path.read_bytes() for path in pair.values()]
        for path, content in zip(pair.values(), reversed(contents)):
            path.write_bytes(content)
    assert pairs.run(tmp_path / "out") == 1
    left_out = json.loads((tmp_path / "out" / "stats_train.json").read_text())["left_out"]
    assert len(left_out) == 9
    for stem, message in left_out.items():
        expected = {"orphan": "found none", "double": "found also", "swapped": "expected an 8-bit RGB image"}
        assert expected[stem[:-1]] in message and stem in message


def test_a_file_without_a_name_is_named(tmp_path):
    for folder, content in (("train", png(noise(*IMAGE))), ("trainannot", png(ids(*LABELS, high=12)))):
        (tmp_path / "camvid" / folder).mkdir(parents=True)
        for name in (".png", "a.png"):
            (tmp_path / "camvid" / folder / name).write_bytes(content)
    assert preprocess(tmp_path / "camvid", tmp_path / "out") == 1
    stats = json.loads((tmp_path / "out" / "stats_train.json").read_text())
    assert list(stats["files"]) == ["a"] and "expected a name before its ending" in stats["left_out"][""]


def test_swapped_folders_leave_what_was_processed_alone(pairs, tmp_path, capsys):
    assert pairs.run(tmp_path / "out") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    swap = [pairs.root / name for name in ("leftImg8bit", "gtFine")]
    swap[0].rename(pairs.root / "kept")
    swap[1].rename(swap[0])
    (pairs.root / "kept").rename(swap[1])
    assert pairs.run(tmp_path / "out") == 1
    assert "nothing usable" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


NAMES = [
    "new\nline",
    "two\n\nlines\n",
    "tab\tand\rreturn",
    "\udcff\udcfe",
    "a\udc80b",
    "\udce9t\udce9",
    "..",
    "...",
    "-rf",
]
NAMES += ["$(touch owned)", "`touch owned`", "; touch owned", "%s%n", "{0}", "'\"", "\x1b[2J", "né😀", "con", "x" * 200]


def test_any_name_is_handled_and_writes_nowhere_else(pairs, tmp_path, capsys):
    for name in NAMES:
        pairs.add(name)
        pairs.add(f"bad {name}", image=b"no picture")
    inside = set(os.listdir(tmp_path))
    assert pairs.run(tmp_path / "out") == 1
    stats = json.loads((tmp_path / "out" / "stats_train.json").read_text())
    assert set(stats["files"]) == {*NAMES, "fine"} and len(stats["left_out"]) == len(NAMES)
    assert len(data.load_split(tmp_path / "out", "train")) == len(NAMES) + 1
    assert set(os.listdir(tmp_path)) == inside | {"out"}
    for path in (tmp_path / "out").rglob("*"):
        assert path.resolve().is_relative_to((tmp_path / "out").resolve())


# ---- arrays of the processed folder


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


class Payload:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def header(text):
    text = text.encode("latin1").ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(100)


SHAPE = (32, 32, 3)
UNIT = RNG.random(SHAPE).astype(np.float32)


def arrays(owned):
    """kind: cases; each is a whole .npy file that must be refused."""
    nan, high, low = UNIT.copy(), UNIT.copy(), UNIT.copy()
    nan[3, 4, 1], high[0, 0, 0], low[9, 9, 2] = np.nan, 1.01, -1e-3
    whole = npy(UNIT)
    return {
        "cut": [whole[:5], whole[:60], whole[:-1], whole[: len(whole) // 2]],
        "flipped bits": [flip(share)(whole) for share in (0.001, 0.3, 0.6, 0.9)],
        "zero bytes": [b"", bytes(10), bytes(len(whole))],
        "pickled": [pickle.dumps(Payload(owned)), pickle.dumps(UNIT), pickle.dumps([Payload(owned)], protocol=0)],
        "objects": [npy(np.array([Payload(owned)] * n, object)) for n in (1, 2, 3)],
        "wrong dtype": [npy(UNIT.astype(kind)) for kind in ("float64", "int64", "complex64", "bool", "int8")],
        "wrong shape": [npy(UNIT[:16]), npy(UNIT[..., 0]), npy(UNIT.transpose(2, 0, 1)), npy(np.float32(1))],
        "NaN": [npy(nan), npy(UNIT * np.nan), npy(nan.astype(np.float16))],
        "out of [0, 1]": [npy(high), npy(low), npy(UNIT * 255), npy(UNIT * np.inf)],
        "other images": [npy(UNIT[::-1]), npy(np.zeros_like(UNIT)), npy(noise(*SHAPE))],
        "declared huge": [
            header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}")
            for shape in ((10**6, 10**6, 3), (2**62,), (10**30, 3), (-5, 32, 3))
        ],
        "headers that are code": [
            header(text) for text in ("__import__('os').mkdir('owned')", "{'descr': '|O'}", "(" * 90, "{'descr': 1}")
        ],
    }


def test_each_kind_of_bad_array_is_named(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = arrays(tmp_path / "owned")
    contents = {f"{kind}-{number}": case for kind, cases in kinds.items() for number, case in enumerate(cases)}
    assert all(len(cases) >= 3 for cases in kinds.values()) and len(contents) == 44
    for stem in contents:
        pairs.add(stem)
    assert pairs.run(tmp_path / "out") == 0
    for stem, content in contents.items():
        (tmp_path / "out" / "images_processed" / "train" / f"{stem}.npy").write_bytes(content)
    with pytest.raises(ValueError) as error:
        data.load_split(tmp_path / "out", "train")
    lines = str(error.value).splitlines()
    assert len(lines) == len(contents) + 1
    for stem in contents:
        assert sum(f"{stem}.npy: expected" in line for line in lines) == 1, stem
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f2", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_other_ways_to_store_the_same_are_handled(clean, tmp_path, dtype, order):
    shutil.copytree(clean, tmp_path / "out")
    k = data.load_split(tmp_path / "out", "train").images[0].numpy()
    image, mask = (next((tmp_path / "out").glob(f"{kind}_processed/train/*")) for kind in ("images", "masks"))
    stored = k if dtype == "u1" else k / np.float32(255)
    image.write_bytes(npy(np.asarray(stored.astype(dtype), order=order)))
    Image.open(mask).save(mask)  # without the note that holds the image's checksum
    assert (data.load_split(tmp_path / "out", "train").images[0].numpy() == k).all()


MASKS = {
    "cut": [cut(0.2), cut(0.6), lambda c: c[:-3]],
    "flipped bits": [flip(0.3), flip(0.55), flip(0.95)],
    "zero bytes": [cut(0.0), lambda c: bytes(len(c)), lambda c: bytes(3)],
    "wrong size": [lambda c: png(ids(16, 32, high=7)), lambda c: png(ids(32, 64, high=7)), lambda c: declares(9000, 9000, 0)],
    "wrong mode": [lambda c: png(noise(32, 32, 3)), lambda c: palette(), lambda c: sixteen_bit(32, 32)],
    "ids out of range": [lambda c: png(ids(32, 32, low=7, high=8)), lambda c: png(ids(32, 32)), lambda c: png(ids(32, 32, low=254, high=255))],
}  # fmt: skip


def test_each_kind_of_bad_mask_is_named(pairs, tmp_path):
    damages = {f"{kind}-{number}": case for kind, cases in MASKS.items() for number, case in enumerate(cases)}
    for stem in damages:
        pairs.add(stem)
    assert pairs.run(tmp_path / "out") == 0
    for stem, damage in damages.items():
        path = tmp_path / "out" / "masks_processed" / "train" / f"{stem}.png"
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        data.load_split(tmp_path / "out", "train")
    assert str(error.value).startswith("18 unusable files") and all(
        f"{s}.png: expected" in str(error.value) for s in damages
    )


def test_what_rotted_in_the_output_is_made_anew(pairs, tmp_path):
    for number in range(4):
        pairs.add(f"pair{number}")
    assert pairs.run(tmp_path / "out") == 0
    whole = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for path in [*(tmp_path / "out").rglob("*.npy"), *(tmp_path / "out").rglob("masks_processed/*/*.png")][::2]:
        path.write_bytes(flip(0.7)(path.read_bytes()))
    assert pairs.run(tmp_path / "out") == 0
    assert {path: path.read_bytes() for path in whole} == whole


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "\x00", "[" * 100_000, '{"layout": "cityscapes"}', '{"size": NaN}', "9" * 5000,
    {"class_set": "dragons"}, {"class_set": []}, {"class_set": {}}, {"layout": "../../etc"}, {"layout": 7},
    {"size": "32x32"}, {"size": [32]}, {"size": [10**9, 10**9]}, {"size": [-1, 32]}, {"size": [32.0, 32]},
    {"files": []}, {"files": "all"}, {"files": {"../../../etc/passwd": {}}}, {"files": {}},
], ids=lambda content: str(content)[:20])  # fmt: skip
def test_edited_statistics_are_named(clean, tmp_path, content):
    shutil.copytree(clean, tmp_path / "out")
    path = tmp_path / "out" / "stats_train.json"
    text = content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"stats_train.json"):
        data.load_split(tmp_path / "out", "train")


# ---- checkpoints and settings of a run


@pytest.fixture(scope="module")
def trained(processed, tmp_path_factory):
    """A run of one epoch, and one of two that was stopped after the first."""
    home = tmp_path_factory.mktemp("trained")
    os.environ["WANDB_MODE"] = "disabled"
    tiny = ["--data", str(processed), "--channels", "4", "--depth", "2", "--batch-size", "2", "--precision", "fp32"]
    assert main(["train", "scratch", *tiny, "--epochs", "1", "--out", str(home / "run")]) == 0
    state = checkpoint.load_state(home / "run")
    shutil.copytree(home / "run", home / "half")
    config = json.loads((home / "half" / "config.json").read_text())
    config["settings"]["epochs"] = state["config"]["settings"]["epochs"] = 2
    (home / "half" / "config.json").write_text(json.dumps(config))
    checkpoint.save_state(home / "half", state)
    os.environ["WANDB_MODE"] = "offline"
    yield home, ["train", "scratch", *tiny, "--epochs", "2", "--out"]


def weights(state, **metadata):
    """A weights file that unetseg might have written."""
    known = dict.fromkeys(checkpoint.METADATA, "0") | {"class_set": "cityscapes7", "channels": "4", "depth": "2"}
    known |= {"width": "64", "height": "32", "void": "ignore", "stage": "scratch", "epoch": "1"}
    return safetensors.torch.save(state, known | {"sha256": checkpoint.checksum(state)} | metadata)


def bad_weights(whole, owned):
    state = safetensors.torch.load(whole)
    buffer = io.BytesIO()
    torch.save(Payload(owned), buffer)
    size = struct.pack("<Q", 2**40)
    return {
        "cut": [whole[:4], whole[:500], whole[: len(whole) // 2], whole[:-1]],
        "flipped bits": [flip(share)(whole) for share in (0.0001, 0.5, 0.9, 0.999)],
        "zero bytes": [b"", bytes(8), bytes(len(whole))],
        "pickles": [pickle.dumps(Payload(owned)), buffer.getvalue(), pickle.dumps([Payload(owned)], protocol=0)],
        "declared huge": [size + whole[8:], struct.pack("<Q", 2**63), weights(state, channels="1024"), weights(state, depth="8")],
        "foreign shape": [
            weights({"weight": torch.zeros(3)}),
            weights(state | {"head.weight": torch.zeros(7, 9, 1, 1)}),
            weights({key: value for key, value in state.items() if "head" not in key}),
            weights(state, class_set="cityscapes19"),
        ],
        "not finite": [weights(state | {"head.bias": torch.full((7,), value)}) for value in (math.nan, math.inf, -math.inf)],
        "foreign metadata": [
            safetensors.torch.save(state),
            weights(state, channels="many"),
            weights(state, depth="1000000000"),
            weights(state, class_set="../../dragons"),
            weights(state, width="-3"),
            weights(state, void="maybe"),
        ],
    }  # fmt: skip


def test_each_kind_of_bad_weights_is_named_and_runs_nothing(trained, processed, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(noise(*IMAGE)))
    kinds = bad_weights((trained[0] / "run" / "model.safetensors").read_bytes(), tmp_path / "owned")
    assert all(len(cases) >= 3 for cases in kinds.values())
    path = tmp_path / "model.safetensors"
    for kind, cases in kinds.items():
        for number, content in enumerate(cases):
            path.write_bytes(content)
            fine_tune = [
                "train",
                "ce_dice",
                "--data",
                str(processed),
                "--init",
                str(path),
                "--out",
                str(tmp_path / "t"),
            ]
            for command in (["predict", str(path), str(picture), "--out", str(tmp_path / "out")], fine_tune):
                assert main(command) in (1, 2), (kind, number, command[0])
                said = capsys.readouterr().err
                assert str(path) in said and "Traceback" not in said and len(said) < 3000, (kind, number, said)
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()


def packed(content, path):
    """The same archive with other content in its pickle, or compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            is_pickle = entry.filename.endswith("data.pkl")
            how = zipfile.ZIP_DEFLATED if content is None else zipfile.ZIP_STORED
            new.writestr(entry.filename, content if content and is_pickle else old.read(entry), how)
    return buffer.getvalue()


def flipped(whole):
    """An archive with one bit changed, in the middle of each of its three largest members (between them is padding)."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        largest = sorted(archive.infolist(), key=lambda entry: entry.file_size)[-3:]
    for entry in largest:
        lengths = whole[entry.header_offset + 26 :][:4]
        start = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        yield flip((start + entry.file_size // 2) / len(whole))(whole)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_each_kind_of_bad_state_is_named_and_runs_nothing(trained, tmp_path, capsys):
    home, train = trained
    whole, state = (home / "half" / "state.pt").read_bytes(), checkpoint.load_state(home / "half")
    owned = tmp_path / "owned"
    position, trainer = state["position"], state["trainer"]
    kinds = {
        "cut": [whole[:10], whole[: len(whole) // 2], whole[:-1]],
        "flipped bits": flipped(whole),
        "zero bytes": [b"", bytes(9), bytes(len(whole))],
        "pickles": [pickle.dumps(Payload(owned)), saved(Payload(owned)), saved(state | {"trainer": Payload(owned)})],
        "archives": [packed(pickle.dumps(Payload(owned)), home / "half" / "state.pt"), packed(None, home / "half" / "state.pt"),
                     packed(b"cos\nmkdir\n(S'owned'\ntR.", home / "half" / "state.pt")],
        "foreign": [saved([]), saved({}), saved(state | {"position": {"step": "one"}}),
                    saved(state | {"trainer": {}}), saved(state | {"trainer": trainer | {"model": {}}}),
                    saved(state | {"position": position | {"history": 3}}), saved(state | {"position": position | {"sums": torch.zeros(2)}}),
                    saved(state | {"position": position | {"step": -1}}), saved(state | {"config": {}})],
        "steps and parts": [saved(state | {"trainer": trainer | edit}) for edit in (
            {"steps": -1}, {"steps": 10**30}, {"steps": 1.5}, {"steps": None}, {"part": 0}, {"part": "all"})],
        "positions": [saved(state | {"position": position | edit}) for edit in (
            {"step": 1.5}, {"step": 1.0}, {"step": 10**30}, {"seconds": "long"}, {"history": [{"a": 1}]}, {"sums": 4},
            {"history": [position["history"][0] | {"val_miou": math.nan}]}, {"history": position["history"] * 2},
            {"confusion": None}, {"confusion": torch.zeros(3, 2)})],
        "moments": [saved(state | {"trainer": trainer | {"moments": moments}}) for moments in (
            {0: {"step": torch.ones(()), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}},
            {0: trainer["moments"][0] | {"exp_avg": torch.zeros(3)}}, {0: trainer["moments"][1]}, {10**6: {}}, {0: {}},
            {0: trainer["moments"][0] | {"exp_avg_sq": torch.zeros(1).expand(9, 9, 9, 9)}}, [], None)],
    }  # fmt: skip
    for kind, cases in kinds.items():
        for number, content in enumerate(cases):
            run = tmp_path / "run"
            shutil.copytree(home / "half", run, dirs_exist_ok=True)
            (run / "state.pt").write_bytes(content)
            assert main([*train, str(run)]) == 1, (kind, number)
            said = capsys.readouterr().err
            assert "state.pt" in said and "Traceback" not in said, (kind, number, said)
    assert not owned.exists()


EDITS = [
    {"precision": "fp99"}, {"precision": "bf16"}, {"channels": 8}, {"seed": 9}, {"class_set": "camvid7"}, {"commit": 3},
    {"settings": {}}, {"settings": {"epochs": "many"}}, {"settings": None}, {"settings": [1]}, {"parameters": None}, {"void": ["ignore"]}, {"torch": {}},
]  # fmt: skip


@pytest.mark.parametrize(
    "edit", [*EDITS, "", "{", "[]", '"text"', "[" * 100_000, "\udcff"], ids=lambda edit: str(edit)[:25]
)
def test_an_edited_config_is_named(trained, processed, tmp_path, capsys, edit):
    home, train = trained
    run = shutil.copytree(home / "half", tmp_path / "run")
    text = edit if isinstance(edit, str) else json.dumps(json.loads((run / "config.json").read_text()) | edit)
    (run / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main([*train, str(run)]) == 1
    said = capsys.readouterr().err
    assert str(run) in said and "Traceback" not in said
    assert main(["evaluate", str(run), "--data", str(processed)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_settings_edited_after_the_fact_are_seen(trained, tmp_path, capsys):
    home, train = trained
    for number, edit in enumerate(({"lr": 0.5}, {"batch_size": 3}, {"weight_decay": 1.0})):
        run = shutil.copytree(home / "half", tmp_path / f"run{number}")
        config = json.loads((run / "config.json").read_text())
        config["settings"] |= edit
        (run / "config.json").write_text(json.dumps(config))
        (key, value), *_ = edit.items()
        options = [part for part in train[:-1] if part != "--out"]
        assert main([*options, f"--{key.replace('_', '-')}", str(value), "--out", str(run)]) == 1
        assert "was config.json edited?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["epoch\none\n", "epoch,val_miou\n1\n", "\x00", 'a"b\n"', b"\xff\xfe", "epoch\n1,2,3\n"]
)
def test_an_edited_history_is_named(trained, tmp_path, capsys, content):
    home, train = trained
    run = shutil.copytree(home / "half", tmp_path / "run")
    (run / "history.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    status = main([*train, str(run)])
    assert (status == 1 and "history.csv" in capsys.readouterr().err) or len(checkpoint.read_history(run)) == 2


def test_weights_of_an_unknown_run_are_not_written_over(trained, tmp_path, capsys):
    home, train = trained
    for name in ("model.safetensors", "state.pt"):
        (tmp_path / name).mkdir()
        shutil.copy(home / "run" / name, tmp_path / name)
        assert main([*train, str(tmp_path / name)]) == 1
        assert f"holds {name} of an unknown run" in capsys.readouterr().err


# ---- pictures to predict


def test_each_kind_of_bad_photo_is_named(trained, tmp_path, capsys):
    photos, whole = tmp_path / "photos", png(noise(*IMAGE))
    photos.mkdir()
    deep = [("16bit.png", sixteen_bit(*LABELS)), ("float.tif", None), ("int.tif", None)]
    bad = {"cut0.png": whole[:20], "cut1.png": whole[: len(whole) // 2], "cut2.jpg": jpeg("RGB")[:90], "empty.png": b"",
           "text.jpg": b"hello", "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "zeros.png": bytes(999), "bomb0.png": declares(60_000, 60_000),
           "bomb1.png": declares(8_193, 8_192), "bomb2.png": declares(2**31 - 1, 9), **dict(deep)}  # fmt: skip
    for name, content in bad.items():
        if content is not None:
            (photos / name).write_bytes(content)
    Image.fromarray(UNIT[..., 0]).save(photos / "float.tif")
    Image.fromarray(UNIT[..., 0].astype(np.int32)).save(photos / "int.tif")
    (photos / "loop.png").symlink_to("loop.png")
    os.mkfifo(photos / "fifo.png")
    (photos / "circle").symlink_to(".")
    modes = ("RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "YCbCr")
    for mode in modes:
        kind = "jpg" if mode in ("CMYK", "YCbCr") else "png"
        Image.new(mode, (40, 30)).save(photos / f"good {mode}\n.{kind}")
    assert main(["predict", str(trained[0] / "run"), str(photos), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    for name in (*bad, "loop.png", "fifo.png"):
        assert f"{photos / name}: " in said, name
    assert "Traceback" not in said
    assert (
        len(list((tmp_path / "out" / "ids").glob("good*.png")))
        == len(modes)
        == len(list((tmp_path / "out" / "ids").iterdir()))
    )


def test_photos_beside_their_predictions_are_predicted_once(trained, tmp_path):
    (tmp_path / "photo.png").write_bytes(png(noise(*IMAGE)))
    for _ in range(2):  # the second time the folder holds our own output, too
        assert main(["predict", str(trained[0] / "run"), str(tmp_path), "--out", str(tmp_path)]) == 0
        assert [path.name for path in (tmp_path / "ids").glob("*.png")] == ["photo.png"]


# ---- scores


@pytest.mark.parametrize(
    "edit", [{}, {"rules": {}}, {"rules": []}, {"trained_void": None}, {"trained_void": []}, {"rules": {"ignore": 3}}]
)
def test_edited_scores_are_named(trained, processed, tmp_path, edit):
    run = shutil.copytree(trained[0] / "run", tmp_path / "run")
    assert main(["evaluate", str(run), "--data", str(processed)]) == 0
    path = run / "results_test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit if edit else {}))
    with pytest.raises(ValueError, match=r"results_test.json: expected the scores of a run"):
        inference.read_results(run)


def test_a_finished_run_on_a_read_only_place_is_used_as_it_is(trained, processed, tmp_path, monkeypatch, capsys):
    def read_only(*args, **more):
        raise OSError(30, "Read-only file system", "run")

    run = shutil.copytree(trained[0] / "run", tmp_path / "run")
    for place in ("stages.exclusive", "stages.write_json", "inference.write_json"):
        monkeypatch.setattr(f"unetseg.{place}", read_only)
    train = [part for part in trained[1] if part != "--out"]
    train[train.index("--epochs") + 1] = "1"
    assert main([*train, "--out", str(run)]) == 0
    assert main(["evaluate", str(run), "--data", str(processed)]) == 0
    said = capsys.readouterr()
    assert "pixel accuracy" in said.out and "the scores are not kept" in said.err


# ---- the parsers, with whatever hypothesis finds

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PNG, NPY = png(ids(16, 16), compress_level=1), npy(UNIT[:4, :4])


@st.composite
def mutated(draw, whole):
    """A file with some bytes changed, inserted or cut out."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, len(content))), draw(st.integers(0, 9))
        content[place : place + length] = draw(st.binary(max_size=9))
    return bytes(content)


@FEW
@given(mutated(PNG))
def test_a_changed_png_is_refused_or_whole(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    try:
        assert pictures.read_png(tmp_path / "a.png", "L")[0].dtype == np.uint8
    except pictures.BadFile as error:
        assert "a.png: expected" in str(error)


@FEW
@given(st.one_of(mutated(NPY), st.binary(max_size=60).map(lambda text: header(text.decode("latin1")))))
def test_a_changed_array_is_refused_or_whole(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    try:
        assert processed.read_image(tmp_path / "a.npy", (4, 4, 3), None)[0].dtype == np.uint8
    except ValueError as error:
        assert "a.npy: expected" in str(error)


@FEW
@given(st.data())
def test_changed_weights_are_refused_or_the_same(trained, tmp_path, data):
    whole = (trained[0] / "run" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.draw(mutated(whole)))
    try:
        state, _ = checkpoint.load_weights(tmp_path)
        assert all(torch.equal(value, state[key]) for key, value in safetensors.torch.load(whole).items())
    except ValueError as error:
        assert "model.safetensors: expected" in str(error)


@FEW
@given(st.one_of(st.text(max_size=60), st.recursive(st.none() | st.integers() | st.floats(), st.lists).map(json.dumps)))
def test_any_json_and_any_history_is_refused_or_read(tmp_path, text):
    for name, read in (("config.json", checkpoint.read_config), ("history.csv", checkpoint.read_history)):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            read(tmp_path)
        except ValueError as error:
            assert name in str(error)


# ---- memory


def test_nothing_of_this_takes_a_gigabyte(trained, tmp_path):
    pairs = Raw(tmp_path / "raw")
    for number, (width, height) in enumerate(((10**5, 10**5), (8192, 8193), (30_000, 30_000), (8192, 4096))):
        pairs.add(f"bomb{number}", image=declares(width, height), labels=declares(width, height, 0))
    pairs.add("device")["image"].unlink()
    (pairs.root / "leftImg8bit/train/city/device_leftImg8bit.png").symlink_to("/dev/zero")
    code = f"""
import resource, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "preprocessing")]!r}
import image_segmentation_preprocessing as preprocessing
assert preprocessing.main(["--data_dir", {str(pairs.root)!r}, "--output_dir", {str(tmp_path / "out")!r}, "--workers", "1"]) == 1
from unetseg.__main__ import main
assert main(["predict", {str(trained[0] / "run")!r}, {str(pairs.root)!r}, "--out", {str(tmp_path / "p")!r}]) == 1
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))  # since exec
print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1024
