"""Data sets as people have them, each drawn here in its layout, and what is wrong with some of them."""

import io
import shutil
import tomllib

import numpy as np
import pytest
from conftest import command, process
from PIL import Image

from unetseg.classes import CLASS_SETS
from unetseg.files import UserError, read_json
from unetseg.images import cv2
from unetseg.processed import pair_paths
from unetseg.tools import doctor, judge, kaggle, layouts, preprocess
from unetseg.tools.class_files import read_class_file
from unetseg.tools.scenes import draw_scene

NUMBER = {"train": 6, "val": 4}
COLOURS = np.zeros((256, 3), np.uint8)  # of Cityscapes' label ids
for colour, id_ in layouts.CITYSCAPES_COLOURS.items():
    COLOURS[id_] = colour
COLOURS[18] = COLOURS[17]
TO_TRAIN_ID = np.full(256, 255, np.uint8)
TO_TRAIN_ID[layouts.TRAIN_IDS[:19]] = np.arange(19)
SEGNET = CLASS_SETS["camvid7"].lookup


@pytest.fixture(scope="module")
def scenes():
    """split -> [(image, label ids)]"""
    return {s: [draw_scene((256, 128), (9, k, n)) for n in range(NUMBER[s])] for k, s in enumerate(NUMBER)}


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)


def write(scenes, image_path, label_path, labels=lambda ids: ids, image=lambda picture: picture, **options):
    """One file for each image and label; the paths are patterns with {split}, {city} and {stem}."""
    for split, pairs in scenes.items():
        for n, (picture, ids) in enumerate(pairs):
            names = {"split": split, "city": f"city{n % 2}", "stem": f"aachen_{n:06d}_000019", "n": n + 1}
            save(image_path(names) if callable(image_path) else image_path.with_name("x"), image(picture), **options)
            save(label_path(names), labels(ids))


def at(root, pattern):
    return lambda names: root / pattern.format(**names)


def official(
    root, scenes, images="leftImg8bit", ending="png", flavour="labelIds", kind="gtFine", city="{city}/", **more
):
    image = at(root, f"{images}/{{split}}/{city}{{stem}}_leftImg8bit.{ending}")
    write(scenes, image, at(root, f"{kind}/{{split}}/{city}{{stem}}_{kind}_{flavour}.png"), **more)


def apart(root, scenes):
    official(root / "x", scenes)
    shutil.move(root / "x" / "leftImg8bit", root / "leftImg8bit_trainvaltest" / "leftImg8bit")
    shutil.move(root / "x" / "gtFine", root / "Fine Annotations" / "gtFine" / "gtFine")


def image_pairs(root, scenes):
    for split, pairs in scenes.items():
        for n, (picture, ids) in enumerate(pairs):
            small = [Image.fromarray(array).resize((256 + 64 * n,) * 2, 0) for array in (picture, COLOURS[ids])]
            save(root / "cityscapes_data" / split / f"{n + 1}.jpg", np.hstack(small), quality=90)


CITYSCAPES = {
    "official": official,
    "train ids": lambda r, s: official(r, s, flavour="labelTrainIds", labels=lambda ids: TO_TRAIN_ID[ids]),
    "colours": lambda r, s: official(r, s, flavour="color", labels=lambda ids: COLOURS[ids]),
    "images/": lambda r, s: official(r, s, images="images", city=""),
    "JPEG": lambda r, s: official(r, s, ending="JPG", quality=95),
    "opaque alpha": lambda r, s: official(r, s, image=lambda p: np.dstack([p, np.full(p.shape[:2], 255, np.uint8)])),
    "archives apart": apart,
    "image pairs": image_pairs,
    "colour folders": lambda r, s: write(
        s, at(r, "{split}/img/{n}.png"), at(r, "{split}/label/{n}.png"), lambda ids: COLOURS[ids]
    ),
    "arrays": lambda r, s: write(
        s, at(r, "data/{split}/image/{n}.npy"), at(r, "data/{split}/label/{n}.npy"),
        lambda ids: TO_TRAIN_ID[ids].astype(np.int8).astype(float), lambda p: p / 255,
    ),
    "KITTI": lambda r, s: write(s, at(r, "training/image_2/{split}{n}.png"), at(r, "training/semantic/{split}{n}.png")),
}  # fmt: skip


def junk(root):
    """What archives and file browsers leave behind."""
    for path in [root, *(path for path in list(root.rglob("*")) if path.is_dir())]:
        for name in (".DS_Store", "Thumbs.db", "._1.png"):
            (path / name).write_bytes(b"junk")
    save(root / "__MACOSX" / "train" / "img" / "._1.jpg.png", np.zeros((2, 2), np.uint8))


def masks(out, split):
    paths = sorted(pair_paths(out, split, "")[1].parent.glob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


@pytest.mark.parametrize("layout", CITYSCAPES)
def test_every_copy_of_cityscapes_gives_the_masks_of_the_official_one(layout, scenes, tmp_path, monkeypatch):
    CITYSCAPES[layout](tmp_path / "input" / "datasets" / "someone" / "set", scenes)
    junk(tmp_path / "input")
    official(tmp_path / "official", scenes)
    assert process(tmp_path / "official", tmp_path / "reference", "--size", "32") == 0
    monkeypatch.setattr(kaggle, "KAGGLE", tmp_path)
    (data_set,), _ = layouts.find_data_sets(tmp_path / "input")
    assert process(tmp_path / "input", tmp_path / "out", "--size", "32") == 0
    if layout == "KITTI":
        assert len(masks(tmp_path / "out", "train")) == 10
        return
    found, expected = (np.concatenate([masks(tmp_path / o, s) for s in NUMBER]) for o in ("out", "reference"))
    if layout == "image pairs":
        known = found != 255
        assert known.mean() > 0.7 and (found == expected)[known].mean() > 0.97
    else:
        assert (found == expected).all()
    assert data_set.layout.val_is_halved
    assert "train: " in doctor.describe_data(tmp_path / "input")[0]


def camvid_ids(ids):
    """Drawn label ids in SegNet's eleven classes."""
    table = np.full(256, 11, np.uint8)
    table[[23, 11, 17, 7, 8, 21, 20, 13, 26, 27, 28, 24, 25, 33]] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 9, 10, 10]
    return table[ids]


FIRST = [next(n for n, row in enumerate(layouts.CAMVID_ROWS) if row[3] == c) for c in range(12)]  # of 32 ids
PALETTE = np.array([row[:3] for row in layouts.CAMVID_ROWS], np.uint8)
FRAMES = {"train": ["0006R0_f00930", "0016E5_07920", "0001TP_008520"], "val": ["0016E5_07959", "0016E5_08159"]}
FRAMES["test"] = ["Seq05VD_f00000", "0001TP_008550"]


def camvid(root, scenes, image, label, labels, mixed=False):
    pictures = iter([pair for pairs in scenes.values() for pair in pairs])
    for split, stems in FRAMES.items():
        for n, stem in enumerate(stems):
            folder = ["train", "val", "test"][n % 3] if mixed else split
            picture, ids = next(pictures)
            save(root / image.format(split=folder, stem=stem), picture)
            save(root / label.format(split=folder, stem=stem), labels(camvid_ids(ids)))


def colours32(ids):
    return PALETTE[np.array(FIRST)[ids]]


def indices32(ids):
    return np.array(FIRST, np.uint8)[ids]


CAMVID = {
    "SegNet": ("{split}/{stem}.png", "{split}annot/{stem}.png", lambda ids: ids, False),
    "Kaggle": ("CamVid/{split}/{stem}.png", "CamVid/{split}_labels/{stem}_L.png", colours32, True),
    "original": ("701_StillsRaw_full/{stem}.png", "LabeledApproved_full/{stem}_L.png", colours32, False),
    "fastai": ("images/{stem}.png", "labels/{stem}_P.png", indices32, False),
}


@pytest.mark.parametrize("layout", CAMVID)
def test_every_copy_of_camvid_becomes_segnets_split(layout, scenes, tmp_path, capsys):
    *patterns, labels, mixed = CAMVID[layout]
    camvid(tmp_path / "raw", scenes, *patterns, labels, mixed)
    (tmp_path / "raw" / "codes.txt").write_text("\n".join("names"))
    junk(tmp_path / "raw")
    assert process(tmp_path / "raw", tmp_path / "out", "--size", "32", "--log_level", "WARNING") == 0
    assert "val and train share the clip 0016E5: their nearest frames are 39 apart (1.3 s)" in capsys.readouterr().err
    camvid(tmp_path / "segnet", scenes, *CAMVID["SegNet"][:3])
    assert process(tmp_path / "segnet", tmp_path / "reference", "--size", "32") == 0
    for split, stems in FRAMES.items():
        stats = read_json(tmp_path / "out" / f"stats_{split}.json")
        assert list(stats["files"]) == sorted(stems)
        assert (masks(tmp_path / "out", split) == masks(tmp_path / "reference", split)).all()
    assert any("frames pooled" in note for note in stats["notes"]) == (layout != "SegNet")


def test_the_given_split_of_kaggles_camvid_is_kept_on_request_and_marked(scenes, tmp_path):
    camvid(tmp_path / "raw", scenes, *CAMVID["Kaggle"])
    assert process(tmp_path / "raw", tmp_path / "out", "--size", "32", "--given-split") == 0
    stats = read_json(tmp_path / "out" / "stats_train.json")
    assert list(stats["files"]) == ["0006R0_f00930", "0016E5_07959", "Seq05VD_f00000"]
    assert "compare with nothing" in stats["notes"][0]


def test_segnets_split_is_that_of_the_real_names(camvid):
    for split in ("train", "val"):
        stems = [path.stem for path in (camvid / split).glob("*.png")]
        assert {layouts.segnet_split(stem) for stem in stems} == {split} and len(stems) > 100


@pytest.mark.parametrize("quality", [75, 90, 95])
@pytest.mark.parametrize("averaged", [False, True])
def test_jpeg_colours_agree_with_the_true_ids_of_real_frames(cityscapes_sample, quality, averaged):
    """The ranges that docs/data.md gives, for labels shrunk by the nearest pixel and by averaging their colours."""
    seven, ones = CLASS_SETS["cityscapes7"].lookup, np.ones((3, 3), np.uint8)
    agree = []
    for path in sorted(cityscapes_sample.rglob("*_labelIds.png")):
        ids = np.asarray(Image.open(path))
        true = preprocess.shrink_mask(ids, (256, 256))
        shown = cv2.resize(COLOURS[ids], (256, 256), interpolation=cv2.INTER_AREA) if averaged else COLOURS[true]
        buffer = io.BytesIO()
        Image.fromarray(np.hstack([shown, shown])).save(buffer, "JPEG", quality=quality)
        found = seven[layouts.ImagePairs().read_labels(path, buffer.getvalue(), None)]
        edge = cv2.dilate(np.uint8(cv2.morphologyEx(true, cv2.MORPH_GRADIENT, ones) > 0), ones) > 0
        valid, truth = seven[true] != 255, seven[true]
        inside, near = valid & ~edge, valid & edge
        right, void = found == truth, found == 255
        agree.append([inside.sum(), (inside & right).sum(), near.sum(), (near & right).sum(), (near & void).sum()])
    inside, right, near, near_right, near_void = np.sum(agree, axis=0)
    assert len(agree) == 8 and right / inside > 0.997
    assert 0.67 < near_right / near < 0.78 and 0.20 < near_void / near < 0.29


# ---- one's own classes

OWN = """people = ["walker"]
[classes]
ground = { colour = [1, 2, 3], ids = [7, 8] }
walker = { colour = [4, 5, 6], ids = [24, 25] }
[void]
ids = [%s]
"""
REST = ", ".join(str(id_) for id_ in range(34) if id_ not in (7, 8, 24, 25))


def test_ones_own_images_and_masks_train_by_a_class_file(scenes, tmp_path, capsys):
    write(scenes, at(tmp_path / "raw", "images/{split}/{n}.jpg"), at(tmp_path / "raw", "masks/{split}/{n}.png"))
    assert process(tmp_path / "raw", tmp_path / "out", "--size", "32") == 1
    assert "expected classes.toml" in capsys.readouterr().err
    (tmp_path / "raw" / "classes.toml").write_text(OWN % REST)
    assert process(tmp_path / "raw", tmp_path / "out", "--size", "32") == 0
    tiny = ["--epochs", 1, "--channels", 4, "--depth", 1, "--aimed", 1, "--occlusion", 1]
    assert command("train", "scratch", "--data", tmp_path / "out", "--out", tmp_path / "run", *tiny) == 0
    assert command("evaluate", tmp_path / "run", "--data", tmp_path / "out") == 0
    assert "walker" in capsys.readouterr().out
    save(tmp_path / "a.png", np.zeros((40, 60, 3), np.uint8))
    assert command("predict", tmp_path / "run", tmp_path / "a.png", "--out", tmp_path / "p") == 0
    painted = np.asarray(Image.open(tmp_path / "p" / "colour" / "a.png")).reshape(-1, 3)
    assert {tuple(colour) for colour in painted} <= {(1, 2, 3), (4, 5, 6)}


@pytest.mark.parametrize("kind", ["ids", "binary", "colours", "palette"])
def test_a_first_class_file_is_written_from_the_masks_and_works(kind, scenes, tmp_path, capsys):
    def palette(ids):
        picture = Image.fromarray(ids, "P")
        picture.putpalette(COLOURS.ravel().tolist())
        return picture

    labels = {"ids": lambda ids: ids, "binary": lambda ids: np.uint8(255) * (ids == 7)}
    labels |= {"colours": lambda ids: COLOURS[ids] + 1, "palette": palette}
    paths = (at(tmp_path, f"{where}.png") for where in ("images/{split}{n}", "masks/{split}{n}_mask"))
    write(scenes, *paths, labels[kind])
    assert command("classes", tmp_path) == 0
    found = tomllib.loads((tmp_path / "classes.toml").read_text())["classes"]
    assert (len(found) == 2) == (kind == "binary")
    assert all(("ids" in entry) == (kind != "colours") for entry in found.values())
    assert command("classes", tmp_path) == 1 and "exists already" in capsys.readouterr().err
    assert process(tmp_path, tmp_path / "out", "--size", "32") == 0
    stats = read_json(tmp_path / "out" / "stats_train.json")
    assert stats["num_images"] == 10 and sum(stats["pixels"]["resized"].values()) == 10 * 32 * 32


TWO = "[classes]\na = { colour = [1, 2, 3]%s }\nb = { colour = [1, 2, 9]%s }"


@pytest.mark.parametrize("text, said", [
    ("", "the entries none"),
    ("clases = 3", "the entries clases"),
    ("[classes]\na = { colour = [1, 2, 3] }", "two to 253 classes"),
    (TWO.replace("b =", "void =") % ("", ""), "none of them named void"),
    (TWO.replace("9", "3") % ("", ""), "each colour once"),
    (TWO % (", ids = [1]", ", ids = [1]"), "each id once"),
    (TWO % (", ids = [1]", ""), "ids for all classes, or for none"),
    (TWO % (", ids = [1]", ", ids = [256]"), "ids from 0 to 255"),
    (TWO % (", id = [1]", ", id = [2]"), "no entries but"),
    (TWO.replace(", 9", "") % ("", ""), "three whole numbers"),
    (TWO.replace("colour = [1, 2, 9]", "") % ("", ""), "a colour for each class"),
    ("people = ['c']\n" + TWO % ("", ""), "people as a list of names"),
    ("people = 'ab'\n" + TWO % ("", ""), "people as a list of names"), ("[classes", "Expected"),
])  # fmt: skip
def test_a_class_file_that_cannot_be_meant_says_why(text, said, tmp_path):
    (tmp_path / "classes.toml").write_text(text)
    with pytest.raises(UserError, match=rf"classes.toml: expected a class file as in docs/data.md, found .*{said}"):
        read_class_file(tmp_path / "classes.toml")


@pytest.mark.parametrize("images, labels", [
    ("images/{split}/{split}{n}.png", "masks/{split}{n}.png"),
    ("{split}/images/{n}.png", "{split}/masks/{n}.png"), ("{split}/{n}.jpg", "{split}/{n}_mask.png"),
])  # fmt: skip
def test_ones_own_images_may_lie_otherwise_and_be_grey(images, labels, scenes, tmp_path):
    write(scenes, at(tmp_path, images), at(tmp_path, labels), image=lambda picture: picture[..., 0])
    (tmp_path / "classes.toml").write_text(OWN % REST)
    assert process(tmp_path, tmp_path / "out", "--size", "32") == 0
    assert [read_json(tmp_path / "out" / f"stats_{s}.json")["num_images"] for s in NUMBER] == list(NUMBER.values())


def test_masks_that_are_missing_are_named_one_by_one(scenes, tmp_path, capsys):
    write(scenes, at(tmp_path, "images/{split}/{n}.png"), at(tmp_path, "masks/{split}/{n}.png"))
    (tmp_path / "classes.toml").write_text(OWN % REST)
    shutil.rmtree(tmp_path / "masks" / "val")
    assert process(tmp_path, tmp_path / "out", "--size", "32") == 1
    assert capsys.readouterr().err.count("expected its label file") == 4


def test_a_class_file_in_colours_does_not_fit_a_layout_of_ids(scenes, tmp_path, capsys):
    official(tmp_path / "raw", scenes)
    (tmp_path / "c.toml").write_text(TWO % ("", ""))
    assert process(tmp_path / "raw", tmp_path / "out", "--size", "32", "--classes", tmp_path / "c.toml") == 1
    assert "expected ids for each class, as cityscapes has them" in capsys.readouterr().err


def test_one_bad_file_does_not_hide_a_data_set(scenes, tmp_path):
    CITYSCAPES["colour folders"](tmp_path, scenes)
    (tmp_path / "train" / "label" / "1.png").write_bytes(b"cut")
    assert layouts.find_data(tmp_path).layout.name == "cityscapes-colours"
    assert process(tmp_path, tmp_path / "out", "--size", "32") == 1
    assert read_json(tmp_path / "out" / "stats_train.json")["num_images"] == 5


# ---- nothing wrong in silence

ROWS = np.arange(128)[:, None]


def shifted(ids):
    return np.where(ids < 33, ids + 1, 33).astype(np.uint8)


def carla(ids):
    table = np.zeros(256, np.uint8)
    table[[7, 8, 11, 21, 23, 26, 24]] = judge.SCHEMES["cityscapes7"]["CARLA's ids"]
    return table[ids]


@pytest.mark.parametrize("labels, said", [
    (lambda ids: np.where(TO_TRAIN_ID[ids] == 255, 0, TO_TRAIN_ID[ids]).astype(np.uint8), "looks like trainIds"),
    (shifted, "looks like label ids plus one"), (carla, "looks like CARLA's ids"),
])  # fmt: skip
def test_ids_of_another_table_are_an_error_that_names_it(labels, said, scenes, tmp_path, capsys):
    official(tmp_path / "raw", scenes, labels=labels)
    assert process(tmp_path / "raw", tmp_path / "out", "--size", "32") == 1
    assert said in capsys.readouterr().err and not list((tmp_path / "out").glob("stats*"))
    assert command("doctor", "--data", tmp_path / "raw") == 1
    assert said in capsys.readouterr().out


def test_val_that_is_train_is_an_error_and_twins_in_a_split_are_a_warning(scenes, tmp_path, capsys):
    twins = {"train": [*scenes["train"], scenes["train"][0]], "val": scenes["val"]}
    official(tmp_path / "twins", twins)
    assert process(tmp_path / "twins", tmp_path / "out", "--size", "32", "--log_level", "WARNING") == 0
    assert "train: 1 images occur more than once" in capsys.readouterr().err
    leak = {"train": scenes["train"], "val": [*scenes["val"], scenes["train"][2]]}
    official(tmp_path / "leak", leak, compress_level=1)
    assert process(tmp_path / "leak", tmp_path / "leaked", "--size", "32") == 1
    assert "1 images of val are in train, too" in capsys.readouterr().err
    assert not list((tmp_path / "leaked").glob("stats*"))


def test_coarse_labels_are_taken_on_request(scenes, tmp_path):
    official(tmp_path / "raw", scenes)
    official(tmp_path / "raw", scenes, kind="gtCoarse", labels=lambda ids: np.where(ids == 7, 7, 0).astype(np.uint8))
    assert process(tmp_path / "raw", tmp_path / "fine", "--size", "32") == 0
    more = ["--coarse", "--classes", tmp_path / "c.toml"]
    (tmp_path / "c.toml").write_text(OWN % REST)
    assert process(tmp_path / "raw", tmp_path / "coarse", "--size", "32", *more) == 0
    assert set(np.unique(masks(tmp_path / "coarse", "train"))) == {0, 255}


def test_labels_in_another_citys_folder_are_named(scenes, tmp_path, capsys):
    official(tmp_path, scenes)
    path = next((tmp_path / "gtFine" / "train" / "city0").iterdir())
    shutil.move(path, tmp_path / "gtFine" / "train" / "city1" / path.name)
    assert process(tmp_path, tmp_path / "out", "--size", "32") == 1
    assert f"{path.name}: expected it in city0/ as its image" in capsys.readouterr().err


@pytest.mark.parametrize("change, said", [
    (lambda picture, ids, other: (picture[..., ::-1], ids), "more red than blue: are they BGR"),
    (lambda picture, ids, other: (picture, np.roll(ids, (6, 0), (1, 0))), "the mask fits when moved by -6, +0 pixels"),
    (lambda picture, ids, other: (picture, other), "are they pairs"),
    (lambda picture, ids, other: (picture, np.where(ROWS < 125, 7, ids).astype(np.uint8)), "of the pixels are road"),
])  # fmt: skip
def test_what_may_be_wrong_is_a_warning_with_its_evidence(change, said, scenes, tmp_path, capsys):
    changed = {}
    for split, pairs in scenes.items():
        others = [ids for _, ids in pairs[1:] + pairs[:1]]
        changed[split] = [change(picture, ids, other) for (picture, ids), other in zip(pairs, others)]
    official(tmp_path / "raw", changed)
    if "road" in said:
        (tmp_path / "c.toml").write_text(OWN % REST)
    more = ["--classes", tmp_path / "c.toml"] if "road" in said else []
    assert process(tmp_path / "raw", tmp_path / "out", "--size", "32", "--log_level", "WARNING", *more) == 0
    assert said.replace("road", "ground") in capsys.readouterr().err


def test_good_scenes_have_no_warning(scenes, tmp_path, capsys):
    official(tmp_path / "raw", scenes)
    assert process(tmp_path / "raw", tmp_path / "out", "--size", "32", "--log_level", "WARNING") == 0
    assert "warning" not in capsys.readouterr().err


def test_real_frames_have_no_warning(camvid, cityscapes_sample, tmp_path, capsys):
    for number, root in enumerate((camvid, cityscapes_sample)):
        assert process(root, tmp_path / str(number), "--size", "32", "--splits", "train", "--log_level", "WARNING") == 0
    assert "warning" not in capsys.readouterr().err


def test_an_unknown_layout_is_shown_and_several_are_listed(scenes, tmp_path):
    (tmp_path / "frames" / "a").mkdir(parents=True)
    save(tmp_path / "frames" / "a" / "one.png", scenes["val"][0][0])
    said = r"expected .* of docs/data.md; found frames/a/ with 1 files like one.png, 256x128"
    with pytest.raises(UserError, match=said):
        layouts.find_data(tmp_path)
    (tmp_path / "leftImg8bit_trainvaltest.zip").touch()
    with pytest.raises(UserError, match=r"one.png, 256x128, .*trainvaltest.zip is not unpacked"):
        layouts.find_data(tmp_path)
    for name in ("a", "b"):
        official(tmp_path / name, scenes)
    with pytest.raises(UserError, match=r"expected one data set, found 2; name one of them: .*/a \(cityscapes\); .*/b"):
        layouts.find_data(tmp_path)
