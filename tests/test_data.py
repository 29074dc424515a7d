"""The processed folder, as it is read: splits, checks, batches, class weights, instances."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import process
from PIL import Image
from sklearn.model_selection import train_test_split

from unetseg import data, plots
from unetseg.data import Batches, class_weights, instance_boxes, load_split
from unetseg.files import UserError, read_json, write_json
from unetseg.processed import FORMAT, find_split, pair_paths, read_image, scored_split
from unetseg.settings import Settings, with_preset

CPU = torch.device("cpu")


@pytest.fixture
def copy(processed, tmp_path):
    return shutil.copytree(processed, tmp_path / "copy")


def stems(dataset):
    return list(dataset.split.checked)


def test_items_are_what_was_stored(processed):
    train_set = load_split(processed, "train")
    images, masks = train_set.batch(torch.tensor([2]), CPU)
    assert (images.shape, images.dtype, masks.shape, masks.dtype) == (
        (1, 3, 32, 64), torch.float32, (1, 32, 64), torch.int64,
    )  # fmt: skip
    image_path, mask_path = pair_paths(processed, "train", stems(train_set)[2])
    assert (images[0].permute(1, 2, 0).numpy() == np.load(image_path, allow_pickle=False)).all()
    assert (masks[0].numpy() == np.array(Image.open(mask_path))).all()


@pytest.mark.parametrize("num", [2, 3, 5, 500])
def test_val_is_halved_as_scikit_learn_does(num, tmp_path):
    files = {f"{i:04d}": {"crc32": i} for i in range(num)}
    stats = {"format": FORMAT, "class_set": "cityscapes7", "size": [8, 8], "val_is_halved": True, "files": files}
    write_json(tmp_path / "stats_val.json", stats)
    test, val = train_test_split(range(num), test_size=0.5, random_state=42)
    assert list(find_split(tmp_path, "test").checked) == [f"{i:04d}" for i in test]
    assert list(find_split(tmp_path, "val").checked) == [f"{i:04d}" for i in val]
    assert list(find_split(tmp_path, "val_all").checked) == list(files)


def test_without_val_a_fifth_of_train_is_held_out_and_said(copy):
    (copy / "stats_val.json").unlink()
    train, val = find_split(copy, "train"), find_split(copy, "val")
    assert len(val.checked) == 2 and not set(train.checked) & set(val.checked) and len(train.checked) == 4
    assert "held out" in val.note and "held out" in train.note
    assert scored_split(copy) == "val" and len(load_split(copy, "val")) == 2
    with pytest.raises(UserError, match=r"expected the split 'test', found no stats_test.json"):
        load_split(copy, "test")


def test_every_unusable_file_is_named(copy):
    names = stems(load_split(copy, "train"))
    masks, images = copy / "masks_processed" / "train", copy / "images_processed" / "train"
    Image.fromarray(np.full((32, 64), 9, np.uint8)).save(masks / f"{names[0]}.png")
    np.save(images / f"{names[1]}.npy", np.full((32, 64, 3), 2, np.float32))
    np.save(images / f"{names[2]}.npy", np.full((32, 64, 3), np.nan, np.float32))
    np.save(images / f"{names[3]}.npy", np.array([{}]), allow_pickle=True)
    (masks / f"{names[4]}.png").write_bytes(b"no png")
    (images / f"{names[5]}.npy").unlink()
    with pytest.raises(UserError) as error:
        load_split(copy, "train")
    text = str(error.value)
    assert "6 unusable; rerun preprocessing" in text and all(name in text for name in names)
    assert "expected values 0..6 or 255, found [9]" in text and "found 2.0 to 2.0" in text and "nan" in text


def test_a_pair_that_preprocessing_did_not_write_is_named(copy):
    """A mask edited by hand, and an image copied from another place: each would give a wrong number in silence."""
    train_set = load_split(copy, "train")
    image, mask = pair_paths(copy, "train", stems(train_set)[0])
    shutil.copy(pair_paths(copy, "train", stems(train_set)[1])[0], image)
    edited = np.array(Image.open(mask))
    edited[0, 0] = (edited[0, 0] + 1) % 7
    Image.fromarray(edited).save(pair_paths(copy, "train", stems(train_set)[2])[1])
    with pytest.raises(UserError) as error:
        load_split(copy, "train")
    for place in (0, 2):
        assert f"train/{stems(train_set)[place]}: not the pair that preprocessing wrote" in str(error.value)


def test_the_fingerprint_is_of_names_and_pixels_whatever_the_dtype(raw, processed, tmp_path):
    same = load_split(processed, "train")
    for dtype in ("uint8", "float16"):
        assert process(raw, tmp_path / dtype, "--size", "64x32", "--dtype", dtype) == 0
        found = load_split(tmp_path / dtype, "train")
        assert torch.equal(found.images, same.images) and found.split.sha256 == same.split.sha256
        assert np.load(pair_paths(tmp_path / dtype, "train", stems(found)[0])[0]).dtype == dtype
    assert process(raw, tmp_path / "small", "--size", "32") == 0
    small = find_split(tmp_path / "small", "train")
    assert small.sha256 != same.split.sha256 != find_split(processed, "val").sha256


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", ">f4"])
def test_every_level_comes_back_from_every_dtype(dtype, tmp_path):
    k = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    stored = k if dtype == "uint8" else (k / np.float32(255)).astype(dtype)
    for array in (stored, np.asfortranarray(stored)):
        np.save(tmp_path / "a.npy", array)
        found = read_image(tmp_path / "a.npy", (16, 16, 3))
        assert found.dtype == np.uint8 and (found == k).all()


def test_background_rule_turns_void_into_class_0(processed):
    ignore, background = load_split(processed, "train"), load_split(processed, "train", "background")
    void = ignore.masks == 255
    assert void.any() and (background.masks[void] == 0).all() and (background.masks[~void] == ignore.masks[~void]).all()
    for dataset in (ignore, background):
        counted = np.bincount(dataset.masks.numpy().ravel(), minlength=256)[:7]
        assert dataset.num_pixels.sum(axis=0).tolist() == counted.tolist()


@pytest.mark.parametrize("weighting, by_hand", [
    ("none", [1, 1, 1]), ("sqrt", [2**0.5, 2, 2]), ("inverse", [2, 4, 4]),
    ("median", [0.5, 1, 1]),  # f = 1/2, 1/4, 1/4 where every image shows every class
    ("enet", [1 / math.log(1.52), 1 / math.log(1.27), 1 / math.log(1.27)]),
])  # fmt: skip
def test_class_weights_by_hand(weighting, by_hand):
    weights = class_weights(np.array([[2, 1, 1], [2, 1, 1]]), weighting)
    assert weights == pytest.approx(np.array(by_hand) / np.mean(by_hand)) and weights.mean() == pytest.approx(1)


def test_median_frequency_counts_only_images_that_show_the_class():
    weights = class_weights(np.array([[3, 1], [4, 0]]), "median")  # f = 7/8, 1/4; median 9/16
    assert weights[1] / weights[0] == pytest.approx((7 / 8) / (1 / 4))


def test_an_absent_class_breaks_nothing():
    for weighting in data.WEIGHTINGS:
        weights = class_weights(np.array([[3, 0, 1]]), weighting)
        assert np.isfinite(weights).all() and weights[[0, 2]].mean() == pytest.approx(1)


def test_the_table_shows_each_class_share_of_the_loss(processed):
    train_set = load_split(processed, "train")
    weights = class_weights(train_set.num_pixels, "inverse")
    table = plots.weights_table(train_set.class_set.names, train_set.num_pixels, weights)
    assert len(table.splitlines()) == 8
    shares = [float(line.split()[-1].rstrip("%")) for line in table.splitlines()[1:]]
    assert shares == pytest.approx([100 / 7] * 7, abs=0.11)  # 1/f gives every class the same


def test_batches_cover_the_set_once_in_an_order_that_depends_on_seed_and_epoch(processed):
    train_set = load_split(processed, "train")

    def seen(seed, epoch, size):
        batches = Batches(train_set, size, CPU, with_preset(Settings(seed=seed)))
        found = [indices for _, _, indices in batches.epoch(epoch)]
        assert len(found) == len(batches)
        return torch.cat(found).tolist()

    assert sorted(seen(0, 1, 4)) == list(range(6)) and seen(0, 1, 4) == seen(0, 1, 1)
    assert len({tuple(seen(seed, epoch, 4)) for seed in (0, 1) for epoch in (1, 2, 3)}) > 3
    assert torch.cat([indices for *_, indices in Batches(train_set, 4, CPU).epoch()]).tolist() == list(range(6))


def test_one_augmentation_changes_no_other(processed):
    """With a share of 0 occlusion changes nothing: both see the same flips, zooms and colours."""
    train_set = load_split(processed, "train")
    settings = [Settings(augment=augment, occlusion=0.0) for augment in (("basic",), ("occlude", "basic"))]
    batches = [next(Batches(train_set, 6, CPU, one).epoch(3)) for one in settings]
    assert all(torch.equal(one, other) for one, other in zip(*batches))


def test_instance_boxes_are_components_largest_first(processed):
    train_set = load_split(processed, "train")
    train_set.masks[0] = 1
    train_set.masks[0, 2:8, 4:10] = 4
    train_set.masks[0, 20:30, 40:50] = 4
    train_set.masks[0, 0, 0] = 4  # too small
    boxes, num = instance_boxes(train_set)
    assert num[0] == 2 and boxes[0, :2].tolist() == [[40, 20, 50, 30], [4, 2, 10, 8]]
    with pytest.raises(UserError, match=r"aim_at: expected some of background, .*; found dragon"):
        instance_boxes(train_set, ("dragon",))


def test_stats_of_another_version_are_refused(copy):
    stats = read_json(copy / "stats_train.json")
    (copy / "stats_train.json").write_text(json.dumps({key: stats[key] for key in stats if key != "format"}))
    with pytest.raises(UserError, match="was written by another version of unetseg"):
        load_split(copy, "train")
