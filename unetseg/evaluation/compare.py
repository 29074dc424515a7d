"""Whether two runs, or two groups of seeds, differ: intervals and verdicts from the matrices of single images."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
from scipy import stats

from ..files import UserError
from ..metrics import iou, under_rule
from ..processed import moment
from .results import comparable, read_results

DRAWS, LEVEL = 2000, 0.05
LEAST_BLOCKS, SECONDS = 10, 10  # blocks for an interval, and how much time each of them covers at least


def time_blocks(stems: list[str]) -> tuple[np.ndarray, bool]:
    """The block (N,) of each image, and whether the names tell time. A block covers SECONDS of a clip or more, so that
    neighbouring frames are not taken for independent ones; where names tell no time, each image is a block."""
    moments = [moment(stem) for stem in stems]
    if None in moments:
        return np.arange(len(stems)), False
    spans: dict[str, list[float]] = {}
    for clip, second in moments:
        spans.setdefault(clip, []).append(second)
    names = []
    for clip, second in moments:
        first, length = min(spans[clip]), max(spans[clip]) - min(spans[clip])
        parts = max(1, int(length / SECONDS))
        names.append((clip, min(parts - 1, int((second - first) * parts / max(length, 1e-9)))))
    return np.unique([f"{clip} {part}" for clip, part in names], return_inverse=True)[1], True


def pooled_miou(confusions: np.ndarray, void: str) -> np.ndarray:
    """(..., C + 1, C) counts -> mIoU (...) over the classes that any of them has in the truth; NaN for counts that lack
    one of these, as a draw of few blocks may."""
    found = iou(under_rule(confusions, void))
    return found[..., ~np.isnan(found).all(axis=tuple(range(found.ndim - 1)))].mean(axis=-1)


def difference(
    a: np.ndarray, b: np.ndarray, blocks: np.ndarray, void="ignore", score=pooled_miou, paired=False
) -> dict:
    """The pooled score (mIoU) of group `b` minus that of `a`, with a 95 % interval and a p-value.

    a, b    (S, N, C + 1, C) counts: seeds x images; the same N images, as many seeds as there are
    blocks  (N,) the block of each image, which is drawn as a whole
    paired  whether seed k of `b` belongs to seed k of `a`, as where both started from the same weights
    A paired bootstrap draws blocks of images; the variance between seeds is added to its own. Both are corrected for
    the few that were drawn from, and the interval is Student's with Welch and Satterthwaite's degrees of freedom,
    because the percentiles of a few blocks are too narrow. After Efron & Tibshirani, 1993.
    """
    rng, names = np.random.default_rng(0), np.unique(blocks)
    number = len(names)
    per_block = [np.stack([group[:, blocks == name].sum(axis=1) for name in names], axis=1) for group in (a, b)]
    scores = [score(group.sum(axis=1), void) for group in per_block]  # (S,) each
    found = {"difference": float(scores[1].mean() - scores[0].mean()), "blocks": number, "seeds": [len(a), len(b)]}
    if number < LEAST_BLOCKS:
        return found | {"reason": f"the images make {number} of the {LEAST_BLOCKS} blocks of {SECONDS} s that it takes"}
    if min(len(a), len(b)) == 1 < max(len(a), len(b)):
        return found | {"reason": "one group is a single seed; compare seeds with seeds, or one run with one"}
    draws = rng.multinomial(number, np.full(number, 1 / number), size=DRAWS)  # how often each block is drawn
    drawn = [[score(np.einsum("db,bij->dij", draws, run), void) for run in group] for group in per_block]
    parts = [(np.var(np.mean(drawn[1], 0) - np.mean(drawn[0], 0), ddof=1) * number / (number - 1), number - 1)]
    spreads = [scores[1] - scores[0]] if paired else scores
    parts += [(np.var(group, ddof=1) / len(group), len(group) - 1) for group in spreads if len(group) > 1]
    variance = sum(part for part, _ in parts)
    if not np.isfinite(variance):
        return found | {"reason": "a class is missing from many blocks"}
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts) if variance else number - 1
    t = stats.t(freedom, found["difference"], max(variance, 1e-30) ** 0.5)
    return found | {"interval": [float(end) for end in t.interval(1 - LEVEL)], "p": float(2 * min(t.cdf(0), t.sf(0)))}


def verdicts(found: dict[str, dict]) -> dict[str, dict]:
    """The same comparisons with p-values after Holm (1979) and a verdict: better, worse, or not distinguishable."""
    order = sorted((name for name in found if "p" in found[name]), key=lambda name: found[name]["p"])
    highest, judged = 0.0, dict(found)
    for place, name in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * found[name]["p"]))
        word = "better" if found[name]["difference"] > 0 else "worse"
        judged[name] = found[name] | {"p_holm": highest, "verdict": word if highest < LEVEL else "not distinguishable"}
    return judged


def read_confusions(run: Path, split: str | None = None) -> tuple[dict, np.ndarray]:
    """The results of a run and the matrix of each image (N, C + 1, C). Raises UserError where they are not there."""
    results = read_results(run, split)
    path = run / f"confusions_{results['split']}.npz"
    confusions, sha256 = read_arrays(path, "weights_sha256", "run `evaluate` again")
    if sha256 != results["weights_sha256"]:
        raise UserError(f"{path}: these are of other weights than {run} holds; run `evaluate` again")
    return results, confusions


def read_arrays(path: Path, text: str, advice: str) -> tuple[np.ndarray, str]:
    """The matrix of each image (N, C + 1, C) int64 in an .npz file, and the text there of a name. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["confusions"].astype(np.int64), str(file[text])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: expected a matrix per image, found {error}; {advice}") from None


def compare_runs(base: list[Path], others: dict[str, list[Path]], split: str | None = None) -> dict[str, dict]:
    """Each group of runs (seeds of one recipe) against the base group, with verdicts. Raises UserError."""
    read = {name: [read_confusions(run, split) for run in runs] for name, runs in {"": base, **others}.items()}
    everything = [results for group in read.values() for results, _ in group]
    comparable(everything)
    groups = {name: np.stack([confusions for _, confusions in group]) for name, group in read.items()}
    return verdicts({name: difference_over(groups[""], groups[name], everything[0]) for name in others})


def difference_over(a: np.ndarray, b: np.ndarray, scored: dict, **more: object) -> dict:
    """`difference` on what was scored: `images`, `split` and `trained_void` of results."""
    blocks, timed = time_blocks([image.partition("/")[2] for image in scored["images"]])
    about = {"score": "mIoU", "split": scored["split"], "images": len(blocks), "names_tell_time": timed}
    return difference(a, b, blocks, scored["trained_void"], **more) | about


def verdict_line(name: str, found: dict) -> str:
    """A comparison as a line of text."""
    points = f"{100 * found['difference']:+.2f} points of {found['score']}"
    line = f"{name}: {points} on {found['images']} images of {found['split']}"
    if "interval" not in found:
        return f"{line}; no interval and no verdict: {found['reason']}"
    low, high = (100 * end for end in found["interval"])
    seeds = "" if min(found["seeds"]) > 1 else "; one seed each: what another seed would change is not in it"
    what = f"{found['blocks']} blocks of {SECONDS} s" if found["names_tell_time"] else f"{found['blocks']} images"
    verdict = f"{found['verdict']} (p {found['p_holm']:.3f})" if "verdict" in found else "no verdict"
    return f"{line}, 95 % interval {low:+.2f} to {high:+.2f} ({what}{seeds}): {verdict}"
