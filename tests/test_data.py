import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import train_test_split

from unetseg import data, memory
from unetseg.data import Batches, class_weights, instance_boxes, load_split, weights_table
from unetseg.processed import find_split, scored_split, to_uint8


@pytest.fixture
def copy(processed, tmp_path):
    return shutil.copytree(processed, tmp_path / "copy")


def test_items_are_what_was_stored(processed):
    train_set = load_split(processed, "train")
    image, mask = train_set[2]
    stem = train_set.split.stems[2]
    stored = np.load(processed / "images_processed" / "train" / f"{stem}.npy", allow_pickle=False)
    assert (image.shape, image.dtype) == ((3, 32, 64), torch.float32)
    assert (mask.shape, mask.dtype) == ((32, 64), torch.int64)
    assert (image.permute(1, 2, 0).numpy() == stored).all()
    assert (mask.numpy() == np.array(Image.open(processed / "masks_processed" / "train" / f"{stem}.png"))).all()


def test_val_is_halved_as_scikit_learn_does(processed):
    stems = sorted(path.stem for path in (processed / "images_processed" / "val").glob("*.npy"))
    test, val = train_test_split(range(len(stems)), test_size=0.5, random_state=42)
    assert find_split(processed, "test").stems == [stems[i] for i in test]
    assert find_split(processed, "val").stems == [stems[i] for i in val]
    assert find_split(processed, "val_all").stems == stems


@pytest.mark.parametrize("num", [2, 3, 5, 500])
def test_any_number_of_val_images_is_halved_so(num, tmp_path):
    for folder, suffix in (("images_processed", "npy"), ("masks_processed", "png")):
        (tmp_path / folder / "val").mkdir(parents=True)
        for i in range(num):
            (tmp_path / folder / "val" / f"{i:04d}.{suffix}").touch()
    about = {"layout": "cityscapes", "class_set": "cityscapes7", "size": [8, 8]}
    (tmp_path / "stats_train.json").write_text(json.dumps(about | {"files": {}}))
    (tmp_path / "stats_val.json").write_text(json.dumps(about | {"files": {f"{i:04d}": {} for i in range(num)}}))
    test, val = train_test_split(range(num), test_size=0.5, random_state=42)
    assert find_split(tmp_path, "test").stems == [f"{i:04d}" for i in test]
    assert find_split(tmp_path, "val").stems == [f"{i:04d}" for i in val]


def test_a_damaged_test_split_is_no_missing_one(copy):
    """Else val, on which the best epoch was chosen, would be scored without a word."""
    for folder in ("images_processed", "masks_processed"):
        shutil.copytree(copy / folder / "val", copy / folder / "test")
    for split in ("train", "val", "test"):
        stats = json.loads((copy / f"stats_{'val' if split == 'test' else split}.json").read_text())
        (copy / f"stats_{split}.json").write_text(json.dumps(stats | {"layout": "camvid"}))
    assert scored_split(copy) == "test"
    next((copy / "masks_processed" / "test").iterdir()).unlink()
    with pytest.raises(ValueError, match="image without a mask"):
        scored_split(copy)


def test_without_val_a_fifth_of_train_is_held_out_and_said(copy):
    shutil.rmtree(copy / "images_processed" / "val")
    train, val = find_split(copy, "train"), find_split(copy, "val")
    assert len(val.stems) == 1 and not set(train.stems) & set(val.stems) and len(train.stems) == 5
    assert "held out" in val.note and "held out" in train.note
    assert scored_split(copy) == "val"
    assert len(load_split(copy, "val")) == 1


def test_a_split_that_is_not_there(copy):
    shutil.rmtree(copy / "images_processed" / "val")
    with pytest.raises(ValueError, match="expected a split 'test', found none"):
        load_split(copy, "test")


def test_orphans_are_all_named(copy):
    stems = find_split(copy, "train").stems
    (copy / "masks_processed" / "train" / f"{stems[0]}.png").unlink()
    (copy / "images_processed" / "train" / f"{stems[1]}.npy").unlink()
    np.save(copy / "images_processed" / "train" / "stranger.npy", np.zeros(3))
    with pytest.raises(ValueError) as error:
        load_split(copy, "train")
    for name in (f"{stems[0]}.npy: image without", f"{stems[1]}.png: mask without", "stranger.npy: image without"):
        assert name in str(error.value)


def test_unusable_files_are_all_named(copy):
    stems = find_split(copy, "train").stems
    masks, images = copy / "masks_processed" / "train", copy / "images_processed" / "train"
    Image.fromarray(np.full((32, 64), 9, np.uint8)).save(masks / f"{stems[0]}.png")
    np.save(images / f"{stems[1]}.npy", np.full((32, 64, 3), 2, np.float32))
    np.save(images / f"{stems[2]}.npy", np.full((32, 64, 3), np.nan, np.float32))
    np.save(images / f"{stems[3]}.npy", np.zeros((16, 64, 3), np.float32))
    np.save(images / f"{stems[4]}.npy", np.array([{}]), allow_pickle=True)
    (masks / f"{stems[5]}.png").write_bytes(b"no png")
    with pytest.raises(ValueError) as error:
        load_split(copy, "train")
    text = str(error.value)
    assert "6 unusable files" in text and all(stem in text for stem in stems)
    assert "expected values 0..6 or 255, found [9]" in text and "found 2.0 to 2.0" in text and "nan" in text


def test_no_stats_and_a_wrong_folder(tmp_path):
    with pytest.raises(ValueError, match="run preprocessing first"):
        load_split(tmp_path, "train")


def test_background_rule_turns_void_into_class_0(processed):
    ignore, background = load_split(processed, "train"), load_split(processed, "train", "background")
    void = ignore.masks == 255
    assert void.any() and (background.masks[void] == 0).all() and (background.masks[~void] == ignore.masks[~void]).all()
    for dataset in (ignore, background):
        counted = np.bincount(dataset.masks.numpy().ravel(), minlength=256)[:7]
        assert dataset.num_pixels.sum(axis=0).tolist() == counted.tolist()


@pytest.mark.parametrize("weighting, raw", [
    ("none", [1, 1, 1]),
    ("sqrt", [2**0.5, 2, 2]),
    ("inverse", [2, 4, 4]),
    ("median", [0.5, 1, 1]),  # f = 1/2, 1/4, 1/4 where every image shows every class
    ("enet", [1 / math.log(1.52), 1 / math.log(1.27), 1 / math.log(1.27)]),
])  # fmt: skip
def test_class_weights_by_hand(weighting, raw):
    weights = class_weights(np.array([[2, 1, 1], [2, 1, 1]]), weighting)
    assert weights == pytest.approx(np.array(raw) / np.mean(raw)) and weights.mean() == pytest.approx(1)


def test_median_frequency_counts_only_images_that_show_the_class():
    weights = class_weights(np.array([[3, 1], [4, 0]]), "median")  # f = 7/8, 1/4; median 9/16
    assert weights[1] / weights[0] == pytest.approx((7 / 8) / (1 / 4))


def test_an_absent_class_breaks_nothing():
    for weighting in data.WEIGHTINGS:
        weights = class_weights(np.array([[3, 0, 1]]), weighting)
        assert np.isfinite(weights).all() and weights[[0, 2]].mean() == pytest.approx(1)


def test_the_table_shows_each_class_share_of_the_loss(processed):
    train_set = load_split(processed, "train")
    table = weights_table(train_set, class_weights(train_set.num_pixels, "inverse"))
    assert len(table.splitlines()) == 8
    shares = [float(line.split()[-1].rstrip("%")) for line in table.splitlines()[1:]]
    assert shares == pytest.approx([100 / 7] * 7, abs=0.11)  # 1/f gives every class the same


def test_batches_cover_the_set_once_in_an_order_that_depends_on_seed_and_epoch(processed):
    train_set = load_split(processed, "train")

    def seen(seed, epoch, size):
        found = []
        batches = Batches(
            train_set, size, "cpu", seed, lambda i, m, rows, indices: found.extend(indices.tolist()) or (i, m)
        )
        assert len(list(batches.epoch(epoch))) == len(batches)
        return found

    assert sorted(seen(0, 1, 4)) == list(range(6)) and seen(0, 1, 4) == seen(0, 1, 1)
    assert len({tuple(seen(seed, epoch, 4)) for seed in (0, 1) for epoch in (1, 2, 3)}) > 3
    assert len(Batches(train_set, 4, "cpu")) == 2


def test_instance_boxes_are_components_largest_first(processed):
    train_set = load_split(processed, "train")
    train_set.masks[0] = 1
    train_set.masks[0, 2:8, 4:10] = 4
    train_set.masks[0, 20:30, 40:50] = 4
    train_set.masks[0, 0, 0] = 4  # too small
    boxes, num = instance_boxes(train_set)
    assert num[0] == 2 and boxes[0, :2].tolist() == [[40, 20, 50, 30], [4, 2, 10, 8]]
    with pytest.raises(ValueError, match="found dragon"):
        instance_boxes(train_set, ("dragon",))


def test_a_split_too_large_for_memory_is_mapped_with_the_same_numbers(processed, monkeypatch):
    in_memory = load_split(processed, "train", "background")
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    mapped = load_split(processed, "train", "background")
    assert isinstance(data._room((3, 4)), np.memmap)
    assert torch.equal(in_memory.images, mapped.images) and torch.equal(in_memory.masks, mapped.masks)
    assert (in_memory.num_pixels == mapped.num_pixels).all() and in_memory.sha256 == mapped.sha256
    order = torch.tensor([4, 0, 3])
    assert all(torch.equal(a, b) for a, b in zip(in_memory.batch(order), mapped.batch(order)))


def test_a_mapped_split_that_does_not_fit_on_the_disk_is_an_error(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    with pytest.raises(OSError, match="MiB for a split too large for memory; set TMPDIR"):
        data._room((2**30, 2**20))


def test_the_fingerprint_changes_with_any_pixel_and_with_the_names(copy):
    first = load_split(copy, "train")
    stem = first.split.stems[0]
    path = copy / "masks_processed" / "train" / f"{stem}.png"
    mask = np.array(Image.open(path))
    mask[0, 0] = (mask[0, 0] + 1) % 7
    Image.fromarray(mask).save(path)
    assert load_split(copy, "train").sha256 != first.sha256


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", ">f4"])
def test_every_level_comes_back_from_every_dtype(dtype):
    k = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    stored = k if dtype == "uint8" else (k / np.float32(255)).astype(dtype)
    for array in (stored, np.asfortranarray(stored)):
        found = to_uint8(array)
        assert found.dtype == np.uint8 and (found == k).all()
