"""Scores beyond mIoU: against hand-made shapes, second implementations and the field's own tools."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from conftest import command, process
from monai.metrics import compute_surface_dice
from scipy import stats
from torchmetrics.classification import MulticlassCalibrationError

from unetseg import evaluation
from unetseg.classes import CLASS_SETS
from unetseg.data import load_split
from unetseg.evaluation import compare, details, official, robustness
from unetseg.files import UserError, read_json

SEVEN = CLASS_SETS["cityscapes7"]


def square(x, y, side, size=20):
    region = np.zeros((size, size), np.uint8)
    region[y : y + side, x : x + side] = 1
    return region


def looked_at(pred, mask, sharp=20.0):
    """Details of one image whose logits say `pred`."""
    logits = torch.nn.functional.one_hot(torch.from_numpy(pred).long(), len(SEVEN)).permute(2, 0, 1)[None] * sharp
    found = details.Details(SEVEN)
    found.look(logits.float(), torch.from_numpy(mask).long()[None])
    return found.summary()


@pytest.mark.parametrize("shift, by_hand", [(0, 16), (1, 2)])
def test_boundary_scores_of_a_square_that_is_moved(shift, by_hand):
    """A ring of 16 pixels; moved by one to the right and down, it shares the two where the rings cross."""
    a, b = square(2, 2, 5), square(2 + shift, 2 + shift, 5)
    rings = [details.inner_band(region, 1) for region in (a, b)]
    assert rings[0].sum() == rings[1].sum() == 16
    assert (rings[0] & rings[1]).sum() == by_hand
    scores = looked_at(4 * b, 4 * a)
    assert scores["boundary_iou_1px"]["classes"]["person"] == pytest.approx(by_hand / (32 - by_hand))
    assert scores["boundary_f_2px"]["classes"]["person"] == pytest.approx(1)


@pytest.mark.parametrize("distance", details.DISTANCES)
def test_distances_between_boundaries_are_monais(distance):
    rng = np.random.default_rng(distance)
    pred, mask = (np.kron(rng.integers(0, 2, (2, 6, 6)), np.ones((5, 5), int)) for _ in range(2))
    planes = [torch.from_numpy(np.stack([x == 0, x == 1], axis=1)) for x in (pred, mask)]
    options = {"class_thresholds": [distance] * 2, "include_background": True}
    theirs = [compute_surface_dice(p[None], m[None], **options)[0, 1] for p, m in zip(*planes)]
    ours = []
    for p, m in zip(pred.astype(np.uint8), mask.astype(np.uint8)):
        one = details.Details(SEVEN)
        one._compare(1, p, m)
        hits = one.edges[:, details.DISTANCES.index(distance), 1]
        ours.append((hits[0] + hits[2]) / (hits[1] + hits[3]))
    assert ours == pytest.approx([float(value) for value in theirs])


def test_calibration_error_is_torchmetrics():
    torch.manual_seed(0)
    logits, masks = 2 * torch.randn(4, 7, 16, 16), torch.randint(0, 7, (4, 16, 16))
    masks[:, :3] = 255
    found = details.Details(SEVEN)
    for part in (slice(0, 1), slice(1, 4)):
        found.look(logits[part], masks[part])
    error = MulticlassCalibrationError(7, n_bins=details.BINS, norm="l1", ignore_index=255)
    theirs = error(logits.softmax(dim=1), masks)
    assert found.summary()["calibration_error"] == pytest.approx(float(theirs), abs=1e-6)


def test_iou_by_size_gives_each_false_pixel_to_the_nearest_object():
    mask, pred = np.zeros((100, 100), np.uint8), np.zeros((100, 100), np.uint8)
    mask[10:12, 10:14] = 4  # 8 of 10,000 pixels: small
    mask[50:80, 50:90] = 4  # 1,200: large
    pred[10:12, 10:12] = 4  # half of the small one
    pred[50:80, 50:93] = 4  # all of the large one, and 90 beside it
    pred[5, 10] = 4  # nearest to the small one
    sizes = looked_at(pred, mask)["iou_by_size"]["person"]
    assert sizes == {"small": pytest.approx(4 / 9), "medium": None, "large": pytest.approx(1200 / 1290)}


def test_void_is_in_no_boundary_and_no_object():
    mask, pred = square(2, 2, 5) * np.uint8(4), square(2, 2, 9) * np.uint8(4)
    mask[mask == 0] = 255
    scores = looked_at(pred, mask)
    assert scores["boundary_iou_1px"]["classes"]["person"] == scores["iou_by_size"]["person"]["large"] == 1


def test_a_class_without_truth_has_no_boundary_score():
    scores = looked_at(square(2, 2, 5) * np.uint8(4), np.zeros_like(square(2, 2, 5), np.uint8))
    assert scores["boundary_iou_1px"]["classes"]["person"] is None is scores["boundary_f_1px"]["classes"]["person"]


def test_images_are_spread_ordered_and_pooled_by_place():
    good, bad = np.array([[4, 0], [0, 4], [0, 0]]), np.array([[1, 3], [3, 1], [0, 0]])
    stems = ["ulm_000001_000019", "ulm_000002_000019", "bonn_000001_000019"]
    found = details.spread(np.stack([good, bad, good]), stems, "ignore", worst=1)
    assert found["worst"] == [{"image": stems[1], "miou": pytest.approx(1 / 7)}]
    assert found["places"]["bonn"] == {"images": 1, "miou": 1.0}
    assert found["places"]["ulm"]["miou"] == pytest.approx(5 / 11)
    assert found["quantiles"]["50%"] == 1.0


# ---- intervals


def test_blocks_cover_ten_seconds():
    camvid = [f"0016E5_{frame:05d}" for frame in range(0, 1200, 30)]  # 39 seconds of one clip
    blocks, timed = compare.time_blocks(camvid)
    assert timed and len(set(blocks)) == 3 and (np.diff(blocks) >= 0).all()
    val = [f"0016E5_{frame:05d}" for frame in range(7959, 8160, 2)]
    assert len(set(compare.time_blocks(val)[0])) == 1
    city = [f"lindau_{number:06d}_000019" for number in range(59)]
    assert len(set(compare.time_blocks(city)[0])) == 10
    assert not compare.time_blocks(["a", "b"])[1] and len(set(compare.time_blocks(["a", "b"])[0])) == 2


@pytest.mark.parametrize("seeds, spread, paired", [(1, 0.0, False), (3, 0.02, False), (3, 0.02, True)])
def test_no_difference_is_claimed_more_than_once_in_twenty(seeds, spread, paired, monkeypatch):
    monkeypatch.setattr(compare, "DRAWS", 300)
    rng, claims, number = np.random.default_rng(5), 0, 200
    for _ in range(number):
        state = rng.bit_generator.state["state"]["state"] % 2**32
        pair = []
        for _ in range(2):
            shared = np.random.default_rng(state)  # the same images, so the same difficulty
            hard = shared.normal(0, 0.08, 12)
            pair.append(with_difficulty(rng, hard, seeds, spread))
        found = compare.verdicts({"x": compare.difference(*pair, np.repeat(np.arange(12), 4), paired=paired)})["x"]
        claims += found["verdict"] != "not distinguishable"
        rng.random()
    assert claims <= 0.05 * number, claims


def with_difficulty(rng, hard, seeds, spread):
    """Counts (S, 48, 4, 3) of twelve blocks of four images; block effects of the method itself are random, too."""
    own = rng.normal(0, 0.03, len(hard))
    counts = np.zeros((seeds, 4 * len(hard), 4, 3), int)
    for seed in range(seeds):
        skill = 0.7 + rng.normal(0, spread)
        right = np.clip(skill + np.repeat(hard + own, 4) + rng.normal(0, 0.03, 4 * len(hard)), 0.05, 0.95)
        hits = rng.binomial(300, right[:, None].repeat(3, axis=1))
        for c in range(3):
            wrong = (300 - hits[:, c]) // 2
            counts[seed, :, c, c], counts[seed, :, c, (c + 1) % 3] = hits[:, c], wrong
            counts[seed, :, c, (c + 2) % 3] = 300 - hits[:, c] - wrong
    return counts


def test_a_large_difference_is_found_and_few_blocks_give_no_verdict():
    rng = np.random.default_rng(0)
    a = with_difficulty(rng, np.zeros(12), 3, 0.002)
    b = a.copy()
    b[:, :, range(3), range(3)] += 200
    blocks = np.repeat(np.arange(12), 4)
    found = compare.verdicts({"b": compare.difference(a, b, blocks), "a": compare.difference(a, a, blocks)})
    assert found["b"]["verdict"] == "better" and found["a"]["verdict"] == "not distinguishable"
    low, high = found["b"]["interval"]
    assert low < found["b"]["difference"] < high and found["a"]["difference"] == 0
    few = compare.difference(a[:, :36], b[:, :36], blocks[:36])
    assert "interval" not in few and few["reason"].startswith("the images make 9 of the 10 blocks")
    assert compare.difference(a[:1], b, blocks)["reason"].startswith("one group is a single seed")


def test_the_interval_of_pairs_is_that_of_their_differences():
    """Where all blocks are alike, it is Student's of the three differences 1, 2 and 3, however far apart the pairs."""
    a, b = np.zeros((3, 12, 4, 3), int), np.zeros((3, 12, 4, 3), int)
    a[:, :, 0, 0], b[:, :, 0, 0] = np.array([[10], [50], [30]]), np.array([[11], [52], [33]])
    score = lambda counts, void: counts[..., 0, 0] / 12  # noqa: E731
    found = compare.difference(a, b, np.arange(12), score=score, paired=True)
    half = stats.t.ppf(0.975, 2) / 3**0.5
    assert found["difference"] == 2 and found["interval"] == pytest.approx([2 - half, 2 + half])
    assert compare.difference(a, b, np.arange(12), score=score)["interval"][0] < -40
    rare = compare.difference(a, b, np.arange(12), score=lambda counts, void: np.full(counts.shape[:-2], np.nan))
    assert "interval" not in rare and rare["reason"] == "a class is missing from many blocks"
    counts = np.array([[[5, 0], [5, 0], [0, 0]], [[5, 0], [0, 0], [0, 0]]])  # the second draw lacks a class
    assert np.isnan(compare.pooled_miou(counts, "ignore")).tolist() == [False, True]
    assert compare.pooled_miou(counts[1:], "ignore") == [1]


def test_holm_multiplies_the_smallest_p_by_all():
    found = {name: {"difference": 1.0, "p": p} for name, p in (("a", 0.01), ("b", 0.04), ("c", 0.03))}
    judged = compare.verdicts(found)
    assert [judged[name]["p_holm"] for name in "abc"] == pytest.approx([0.03, 0.06, 0.06])
    assert [judged[name]["verdict"] for name in "abc"] == ["better", "not distinguishable", "not distinguishable"]


# ---- occluders


def test_occluders_are_the_same_everywhere_and_cover_what_they_say(processed):
    """The hash is of all that NumPy alone draws; another one means that published rows no longer hold."""
    dataset, digest = load_split(processed, "val_all"), hashlib.sha256()
    rng = np.random.default_rng(0)
    dataset.images = torch.from_numpy(rng.integers(0, 256, (4, 32, 64, 3), dtype=np.uint8))
    dataset.masks = torch.from_numpy(np.kron(rng.integers(0, 7, (4, 4, 8)), np.ones((8, 8), int)).astype(np.uint8))
    for kind, share, aimed in robustness.conditions():
        image, covered = robustness.occlude(dataset, 1, kind, share, aimed)
        changed = (image != dataset.images[1].numpy()).any(axis=-1)
        if kind == "pasted":
            assert 0 < covered.mean() < share + 0.1
        else:
            assert covered.mean() == pytest.approx(share, abs=0.03) and not changed[~covered].any(), (kind, share)
            digest.update(image.tobytes() + covered.tobytes())
        assert (robustness.occlude(dataset, 1, kind, share, aimed)[0] == image).all()
    rectangles = [robustness.rectangle(0.5, (x, 0), 3.0, (32, 64)).mean() for x in (0, 64)]
    assert rectangles == pytest.approx([0.5, 0.5], abs=0.02)
    assert digest.hexdigest()[:16] == "a822f28bd63605e3"


@pytest.fixture(scope="module")
def scored(made, tmp_path_factory):
    """A tiny trained run, scored in every way."""
    return shutil.copytree(made / "scratch", tmp_path_factory.mktemp("scored") / "run")


def test_the_benchmark_of_a_run_repeats_to_the_byte(scored, processed, monkeypatch, capsys):
    monkeypatch.setattr(robustness, "COVERAGE", (0.2, 0.5))
    monkeypatch.setattr(robustness, "SEVERITIES", (1, 3))
    assert command("evaluate", scored, "--data", processed, "--robustness") == 0
    said, first = capsys.readouterr().out, (scored / "robustness_test.json").read_bytes()
    assert "pasted    people" in said and "boundaries, mean over classes" in said
    robustness.robustness(scored, processed)
    assert (scored / "robustness_test.json").read_bytes() == first
    found = read_json(scored / "robustness_test.json")
    assert found["weights_sha256"] and len(found["occlusion"]) == 24 and found["data_sha256"]


def test_runs_are_compared_on_the_command_line(scored, processed, capsys):
    assert command("evaluate", scored, "--data", processed) == 0
    assert command("compare", scored, "--to", scored) == 0
    said = "+0.00 points of mIoU on 2 images of test; no interval and no verdict: the images make 2"
    assert said in capsys.readouterr().out
    whole = (scored / "confusions_test.npz").read_bytes()
    for content in (b"junk", b"", whole[:-40]):
        (scored / "confusions_test.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"confusions_test.npz: expected a matrix per image"):
            compare.read_confusions(scored)
    evaluation.evaluate_run(scored, processed)
    results, confusions = compare.read_confusions(scored)
    assert confusions.sum(axis=0).tolist() == results["confusion"]


# ---- the official benchmark


def test_full_size_scores_are_those_of_cityscapesscripts(cityscapes_sample, tmp_path, capsys):
    """On real label maps, ignored ids included, to 1e-6; with a network that knows nothing, so that all ids occur."""
    assert process(cityscapes_sample, tmp_path / "data", "--size", "64x32", "--classes", "cityscapes19") == 0
    tiny = ["--epochs", 2, "--channels", 4, "--depth", 1, "--data", tmp_path / "data"]
    assert command("train", "scratch", *tiny, "--out", tmp_path / "run") == 0
    evaluate = ["evaluate", tmp_path / "run", "--data", tmp_path / "data", "--split", "train"]
    assert command(*evaluate, "--official", tmp_path / "pred") == 0
    found = read_json(tmp_path / "run" / "results_train.json")["official"]
    theirs, compared = found["script_scores"]["class"], 0
    for name, iou in found["class_iou"].items():
        if iou is not None:
            compared += 1
            assert iou == pytest.approx(theirs[name.replace("_", " ")], abs=1e-6), name
    assert compared > 10 and found["ceiling"]["miou"] > 0.5 and found["images"] == 6
    assert len(list((tmp_path / "pred").glob("aachen_*_pred_labelIds.png"))) == 6
    assert "numpy.in1d" in found["script"] or "class_instance" in found["script_scores"]
    (tmp_path / "pred" / "aachen_000000_000019_other.png").touch()
    assert command(*evaluate, "--official", tmp_path / "pred") == 1
    assert "expected a folder of its own" in capsys.readouterr().err


def test_a_perfect_prediction_scores_one_and_an_ignored_one_is_a_miss():
    truth = np.array([[7, 7, 8, 0]])
    counts = official.count(truth, np.array([[7, 0, 8, 8]]))
    found = official.scores(counts, CLASS_SETS["cityscapes19"])["class_iou"]
    assert found["road"] == 0.5 and found["sidewalk"] == 1.0 and found["building"] is None
    seven = official.scores(counts, SEVEN)
    assert set(seven["class_iou"]) == {"road", "building", "vegetation", "sky"} and "no mean" in seven["note"]


def test_raw_data_that_have_moved_are_asked_for(scored, processed, tmp_path):
    evaluation.evaluate_run(scored, processed)
    with pytest.raises(UserError, match=r"nowhere: expected the raw data .* name it with --raw"):
        official.score_officially(scored, processed, tmp_path / "out", raw=tmp_path / "nowhere")
