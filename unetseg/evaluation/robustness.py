"""Occluders and common corruptions, decided by names, masks and order of the images: docs/occlusion.md defines them.

An occluder covers a share of one image; scores are taken on the visible, the covered and all pixels. What is underneath
keeps its class, so the covered pixels say what the network infers.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import commit, plots
from ..data import SegmentationSet, load_split
from ..files import UserError, write_json
from ..images import cv2
from ..inference import class_scores, trained_model
from ..metrics import confusion_matrices, miou, under_rule
from .compare import difference, time_blocks
from .details import THINGS
from .results import number, read_results

COVERAGE = (0.1, 0.2, 0.3, 0.4, 0.5)  # shares of the image
SEEN = ("flat", "noise", "patch")  # textures like those of training, in rectangles
UNSEEN = ("stripes", "disc", "pasted")  # a texture, a shape, and instances of other images with a blurred edge
SEVERITIES = (1, 2, 3, 4, 5)
BLUR = 1.5  # pixels: the standard deviation of a pasted instance's edge


def generator(*parts: object) -> np.random.Generator:
    """The random generator that belongs to these names, on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode(errors="surrogateescape")).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def centre(rng: np.random.Generator, mask: np.ndarray, people: list[int], aimed: bool) -> tuple[float, float]:
    """Where the occluder's middle lies (x, y): anywhere, or on a person's pixel where the mask has one."""
    ys, xs = np.nonzero(np.isin(mask, people)) if aimed else ((), ())
    x, y, pick = rng.random(), rng.random(), rng.random()
    if len(ys) == 0:
        return x * mask.shape[1], y * mask.shape[0]
    place = int(pick * len(ys))
    return float(xs[place]), float(ys[place])


def rectangle(share: float, middle: tuple[float, float], aspect: float, shape: tuple[int, int]) -> np.ndarray:
    """A rectangle of width / height `aspect` around `middle`, moved and stretched to lie inside: (H, W) bool."""
    height, width = shape
    wide = min(width, max(1, round((share * width * height * aspect) ** 0.5)))
    high = min(height, max(1, round(share * width * height / wide)))
    wide = min(width, max(wide, round(share * width * height / high)))
    sides = zip(middle, (wide, high), (width, height))
    x, y = (int(np.clip(round(at - side / 2), 0, room - side)) for at, side, room in sides)
    covered = np.zeros(shape, bool)
    covered[y : y + high, x : x + wide] = True
    return covered


def occlude(dataset: SegmentationSet, row: int, kind: str, share: float, aimed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Image `row` with an occluder (H, W, 3) uint8, and the covered pixels (H, W) bool; the same every time."""
    image, mask = dataset.images[row].cpu().numpy(), dataset.masks[row].cpu().numpy()
    rng = generator(dataset.split.images[row], kind, share, "aimed" if aimed else "anywhere")
    people = [dataset.class_set.names.index(name) for name in dataset.class_set.people]
    middle, aspect = centre(rng, mask, people, aimed), float(np.exp(rng.uniform(-0.7, 0.7)))
    colour = rng.integers(0, 256, 3, dtype=np.uint8)
    if kind == "pasted":
        return paste(dataset, row, rng, share, middle)
    covered = rectangle(share, middle, aspect, mask.shape)
    if kind == "disc":
        ys, xs = np.mgrid[: mask.shape[0], : mask.shape[1]]
        distance = (xs - middle[0]) ** 2 + (ys - middle[1]) ** 2
        covered = distance <= np.sort(distance, axis=None)[round(share * mask.size) - 1]
    other = dataset.images[(row + 1 + int(rng.integers(max(1, len(dataset) - 1)))) % len(dataset)].cpu().numpy()
    textures: dict[str, Callable[[], np.ndarray]] = {
        "flat": lambda: np.broadcast_to(colour, image.shape),
        "noise": lambda: rng.integers(0, 256, image.shape, dtype=np.uint8),
        "patch": lambda: other,
        "stripes": lambda: np.where((np.arange(mask.shape[1]) // 8 % 2)[None, :, None] > 0, colour, 255 - colour),
    }
    return np.where(covered[..., None], textures["flat" if kind == "disc" else kind](), image).astype(np.uint8), covered


def paste(dataset: SegmentationSet, row: int, rng: np.random.Generator, share: float, middle: tuple) -> tuple:
    """An instance of another image, at the size that covers `share`, with a blurred edge. As in Amodal Cityscapes
    (Breitenstein & Fingscheidt, IV 2022), whose occluders are pasted instances; here they are connected regions."""
    image, shape = dataset.images[row].cpu().numpy(), dataset.masks.shape[1:]
    names = {*THINGS, *dataset.class_set.people}
    things = [place for place, name in enumerate(dataset.class_set.names) if name in names]
    for other in rng.permutation(len(dataset)):
        region = np.isin(dataset.masks[int(other)].cpu().numpy(), things).astype(np.uint8)
        _, parts, stats, _ = cv2.connectedComponentsWithStats(region)
        if other == row or len(stats) < 2 or stats[1:, 4].max() < 64:
            continue
        part = 1 + int(stats[1:, 4].argmax())
        x, y, wide, high, area = stats[part].tolist()
        scale = (share * image.shape[0] * image.shape[1] / area) ** 0.5
        size = max(1, round(wide * scale)), max(1, round(high * scale))
        cut = (parts[y : y + high, x : x + wide] == part).astype(np.float32)
        texture = dataset.images[int(other)].cpu().numpy()[y : y + high, x : x + wide]
        cut, texture = cv2.resize(cut, size), cv2.resize(texture, size)
        matrix = np.float32([[1, 0, middle[0] - size[0] / 2], [0, 1, middle[1] - size[1] / 2]])
        alpha = cv2.warpAffine(cut, matrix, shape[::-1])
        covered, alpha = alpha > 0.5, cv2.GaussianBlur(alpha, (0, 0), BLUR)[..., None]
        pasted = cv2.warpAffine(texture, matrix, shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        return np.round(image * (1 - alpha) + pasted * alpha).astype(np.uint8), covered
    raise UserError("pasted: expected an instance of people or vehicles in some image, found none")


def conditions() -> Iterator[tuple[str, float, bool]]:
    """Kind, coverage and aim of every occluded pass."""
    return ((kind, share, aimed) for kind in (*SEEN, *UNSEEN) for aimed in (False, True) for share in COVERAGE)


@torch.inference_mode()
def predict_all(model: torch.nn.Module, images: np.ndarray, flip: bool = False) -> np.ndarray:
    """Class ids (N, H, W) of images (N, H, W, 3) uint8, in fp32; `flip`: of the mean with the mirror image."""
    device = next(model.parameters()).device
    parts = (part.to(device).permute(0, 3, 1, 2) / 255 for part in torch.from_numpy(images).split(8))
    return torch.cat([class_scores(model, part, "fp32", flip).argmax(dim=1).cpu() for part in parts]).numpy()


def counts(preds: np.ndarray, masks: np.ndarray, num_classes: int, kept: np.ndarray | None = None) -> np.ndarray:
    """(N, C + 1, C) pixels, truth x prediction with void last, of the kept ones (N, H, W) bool."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [None if array is None else torch.from_numpy(array).to(device) for array in (preds, masks, kept)]
    return confusion_matrices(*tensors[:2], num_classes, tensors[2]).cpu().numpy()


def pooled(found: np.ndarray, void: str) -> float | None:
    """mIoU of (N, C + 1, C) counts together; None where no pixel counts."""
    value = miou(under_rule(found.sum(axis=0), void))
    return value if value == value else None


def against(clean: np.ndarray, found: np.ndarray, blocks: np.ndarray, void: str) -> dict:
    """The pooled mIoU, and its difference to that of the clean images, with an interval where blocks suffice."""
    return {"miou": pooled(found, void), "change": difference(clean[None], found[None], blocks, void)}


def occlusion_scores(
    model: torch.nn.Module, dataset: SegmentationSet, clean: np.ndarray, void: str, chosen: list | None = None
) -> list[dict]:
    """Scores on visible, covered and, unless conditions are chosen, all pixels for each kind, coverage and aim, beside
    what the predictions without an occluder, `clean` (N, H, W), score on the same pixels."""
    num_classes, masks, rows = len(dataset.class_set), dataset.masks.cpu().numpy(), []
    blocks, unoccluded = time_blocks([*dataset.split.checked])[0], counts(clean, masks, num_classes)
    for kind, share, aimed in tqdm(chosen or [*conditions()], "occluders", leave=False, delay=1):
        if aimed and not dataset.class_set.people:
            continue
        row: dict = {"kind": kind, "seen_in_training": kind in SEEN, "coverage": share, "aimed": aimed}
        try:
            pairs = [occlude(dataset, n, kind, share, aimed) for n in range(len(dataset))]
        except UserError as error:
            rows.append(row | {"left_out": str(error)})
            continue
        images, covered = (np.stack(column) for column in zip(*pairs))
        preds = predict_all(model, images)
        row["covered_share"] = float(covered.mean())
        if not chosen:  # the interval takes long
            row["all"] = against(unoccluded, counts(preds, masks, num_classes), blocks, void)
        for name, kept in (("visible", ~covered), ("covered", covered)):
            both = {"miou": preds, "without_occluder": clean}
            row[name] = {key: pooled(counts(found, masks, num_classes, kept), void) for key, found in both.items()}
        rows.append(row)
    return rows


def corruption_scores(model: torch.nn.Module, dataset: SegmentationSet, clean: np.ndarray, void: str) -> list[dict]:
    """Scores under the common corruptions (Hendrycks & Dietterich, ICLR 2019) at five severities, applied after
    shrinking; the package draws from NumPy's global generator, seeded per image."""
    try:
        from imagecorruptions import corrupt, get_corruption_names
    except ImportError:
        return [{"left_out": "imagecorruptions is not installed (pip install imagecorruptions-imaug)"}]
    if min(dataset.size) < 32:
        return [{"left_out": "the corruptions need images of 32 pixels a side and more"}]
    images, masks, rows = dataset.images.cpu().numpy(), dataset.masks.cpu().numpy(), []
    blocks = time_blocks([*dataset.split.checked])[0]
    for name in tqdm(get_corruption_names(), "corruptions", leave=False, delay=1):
        for severity in SEVERITIES:
            made = []
            for image, stem in zip(images, dataset.split.images):
                seed = int(generator(stem, name, severity).integers(2**31))
                np.random.seed(seed)
                own = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}  # these draw from none
                made.append(corrupt(image, severity, name, **own))
            found = counts(predict_all(model, np.stack(made)), masks, len(dataset.class_set))
            rows.append({"corruption": name, "severity": severity, **against(clean, found, blocks, void)})
    return rows


def robustness(run: Path, processed: Path, split: str | None = None) -> dict:
    """Both benchmarks for a run on a split that it was scored on; written to robustness_<split>.json with all that they
    depend on. Raises UserError where there are no scores, or those of other data."""
    results, (model, _) = read_results(run, split), trained_model(run)
    dataset, void = load_split(processed, results["split"]), results["trained_void"]
    if dataset.split.sha256 != results["data_sha256"]:
        raise UserError(f"{processed}: expected the data that {run} was scored on; run `evaluate` again")
    preds = predict_all(model, dataset.images.cpu().numpy())
    clean = counts(preds, dataset.masks.cpu().numpy(), len(dataset.class_set))
    keys = ("run", "split", "split_note", "size", "images", "data_sha256", "trained_void", "weights_sha256")
    found = {key: results[key] for key in keys} | {"commit": commit(), "resolution": "after shrinking"}
    found |= {"clean": pooled(clean, void), "occlusion": occlusion_scores(model, dataset, preds, void)}
    found |= {"corruptions": corruption_scores(model, dataset, clean, void)}
    write_json(run / f"robustness_{results['split']}.json", found)
    plots.save(plots.robustness_curves(found), run / f"robustness_{results['split']}.png", dpi=160)
    return found


def unseen_occluders(model: torch.nn.Module, about: dict, dataset: SegmentationSet) -> dict[str, float | None]:
    """The mIoU lost on visible pixels under each kind of occluder that no training has, placed anywhere; the mean over
    coverages of 10-40 %."""
    clean, lost = predict_all(model, dataset.images.cpu().numpy()), {}
    for kind in UNSEEN:
        rows = occlusion_scores(model, dataset, clean, about["void"], [(kind, share, False) for share in COVERAGE[:4]])
        found = [row["visible"] for row in rows if "visible" in row]
        lost[kind] = float(np.mean([row["without_occluder"] - row["miou"] for row in found])) if found else None
    return lost


def robustness_table(found: dict) -> str:
    """The scores of `robustness` as text."""
    size = "x".join(map(str, found["size"]))
    lines = [f"{found['run']}: {found['split_note']} ({found['split']}), {size}, void={found['trained_void']}"]
    lines += [f"mIoU without occluders {number(found['clean'])}", f"{'occluder':<10}{'where':<10}{'covers':>8}"]
    lines[-1] += f"{'visible':>9}{'covered':>9}{'all':>8}{'change, 95 % interval':>28}"
    for row in found["occlusion"]:
        start = f"{row['kind']:<10}{'people' if row['aimed'] else 'anywhere':<10}{row['coverage']:>8.0%}"
        if "left_out" in row:
            lines.append(f"{start}  left out: {row['left_out']}")
            continue
        change = row["all"]["change"]
        ends = " to ".join(f"{end:+.3f}" for end in change["interval"]) if "interval" in change else "too few blocks"
        scores = row["visible"]["miou"], row["covered"]["miou"], row["all"]["miou"]
        start += "{:>9}{:>9}{:>8}".format(*map(number, scores))
        lines.append(f"{start}{change['difference']:>+9.3f} ({ends})")
    for name in dict.fromkeys(row["corruption"] for row in found["corruptions"] if "corruption" in row):
        scores = [row["miou"] for row in found["corruptions"] if row.get("corruption") == name]
        lines.append(f"{name:<20}" + "".join(f"{number(score):>8}" for score in scores))
    lines += [row["left_out"] for row in found["corruptions"] if "left_out" in row]
    return "\n".join(lines)
