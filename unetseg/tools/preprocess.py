"""Turn a raw data set into the processed folder that training reads.

    python preprocessing/image_segmentation_preprocessing.py --data_dir RAW --output_dir PROCESSED

writes images_processed/<split>/<stem>.npy, masks_processed/<split>/<stem>.png, stats_<split>.json and visualizations/.
A split is made in PROCESSED/.unfinished and moved into place when all of it is there; an interrupted run continues from
that folder, and ends with the same bytes. A rerun makes only what is missing or whose source file has other content. A
bad file is named and left out, the rest is done, and the exit status is then 1.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path

os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # we report broken files ourselves, by name
import numpy as np
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..classes import CLASS_SETS, IGNORE_INDEX, ClassSet, stored
from ..files import FileError, UserError, exclusive, make_folder, read_bytes, read_json, write_bytes, write_json
from ..images import BadFile, cv2, overlay, shrink
from ..processed import FORMAT, checksum, pair_paths, read_image, read_pair, read_stats
from . import judge, parse_size, whole_number
from .class_files import read_class_file
from .layouts import DataSet, Layout, Pair, choose_splits, find_data
from .workers import worker_pool

UNFINISHED = ".unfinished"  # folder in the processed folder where splits are made
JOURNAL = "made_{}.jsonl"  # in it: a record per finished pair
DASK_PATIENCE = 60  # seconds that a Dask cluster may take until its first worker
log = logging.getLogger("preprocessing")


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of the output, besides the source files."""

    layout: str
    class_set: str
    sources: str  # hash of which ids and colours become which class
    size: tuple[int, int]  # width, height
    dtype: str


@dataclass(frozen=True)
class Record:
    """What became of one pair; `full_resolution` and `resized` are pixels per class, void last."""

    stem: str
    source: tuple[int, ...] = ()  # CRC-32 of the image file and of the label file
    crc32: int = 0  # of the processed pixels
    source_size: tuple[int, int] = (0, 0)
    full_resolution: list[int] = field(default_factory=list)
    resized: list[int] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # pixels per source id
    pixels: str = ""  # hash of the processed image
    fit: tuple[float, float, int] | None = None  # of some pairs: see judge.py
    sky: float | None = None
    reused: bool = False
    error: str = ""

    def entry(self) -> dict:
        """What stats_<split>.json keeps of it."""
        return {key: value for key, value in asdict(self).items() if key not in ("stem", "reused", "error")}


def shrink_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another size: the source pixel under each target pixel's centre (INTER_NEAREST takes the top-left)."""
    (height, width), (out_width, out_height) = mask.shape, size
    rows = (2 * np.arange(out_height) + 1) * height // (2 * out_height)
    cols = (2 * np.arange(out_width) + 1) * width // (2 * out_width)
    return mask[rows[:, None], cols]


def count_ids(labels: np.ndarray) -> np.ndarray:
    """Pixels per source id (256,) int64 of (H, W) uint8 ids."""
    parts = np.array_split(labels, 1 + labels.size // 2**23)  # OpenCV's float32 counts are exact up to 2**24
    return sum(cv2.calcHist([part], [0], None, [256], [0, 256]).ravel().astype(np.int64) for part in parts if len(part))


def count_classes(histogram: np.ndarray, class_set: ClassSet) -> list[int]:
    """Pixels per source id (256,) -> pixels per class, void last."""
    per_class = np.bincount(class_set.lookup, weights=histogram, minlength=256)
    return [int(count) for count in (*per_class[: len(class_set)], per_class[IGNORE_INDEX])]


def check_ids(histogram: np.ndarray, class_set: ClassSet, path: Path) -> None:
    """Raise BadFile when a label file holds ids that the class table does not know."""
    if unknown := np.flatnonzero((histogram > 0) & ~class_set.known).tolist():
        highest = int(np.flatnonzero(class_set.known).max())
        hint = "; 255 never occurs in label ids: are these trainIds?" if unknown == [IGNORE_INDEX] else ""
        raise BadFile(f"{path}: expected label ids 0..{highest}, found {unknown}{hint}")


@dataclass(frozen=True)
class Task:
    """What the pairs of a split have in common; every n-th one is looked at by judge.py."""

    staging: Path
    split: str
    recipe: Recipe
    layout: Layout
    class_set: ClassSet
    every: int


def process(job: tuple[Pair, list[tuple[Path, Record]]], task: Task) -> Record:
    """Make one pair in staging, or take it from a folder where an earlier run made it, by one of the job's records; a
    bad file ends in Record.error."""
    pair, earlier = job
    cv2.setNumThreads(1)
    try:
        contents = [read_bytes(path) for path in dict.fromkeys((pair.image, pair.labels)) if path]
        source = tuple(map(zlib.crc32, contents))
        for folder, record in earlier:
            if tuple(record.source) == source and take(folder, task, record):
                return replace(record, reused=True)
        return make(pair, contents, source, task)
    except UserError as error:
        if isinstance(error, FileError) and Path(error.filename).is_relative_to(task.staging):
            raise  # we cannot write: nothing that an earlier run made is to be replaced by less
        return Record(pair.stem, error=str(error))
    except (MemoryError, cv2.error) as error:
        return Record(pair.stem, error=f"{pair.image}: {type(error).__name__} {error}")


def take(folder: Path, task: Task, record: Record) -> bool:
    """Bring the files of an earlier record into staging; False when they are not what the record says."""
    labelled, recipe = bool(record.resized), task.recipe
    try:
        image_path, mask_path = pair_paths(folder, task.split, record.stem)
        if labelled:
            found = read_pair(folder, task.split, record.stem, len(task.class_set), recipe.size)[-1]
        else:
            found = checksum(read_image(image_path, (*recipe.size[::-1], 3)), None)
        if found != record.crc32 or np.load(image_path, mmap_mode="r").dtype != recipe.dtype:
            return False
        for old, new in zip((image_path, mask_path)[: 1 + labelled], pair_paths(task.staging, task.split, record.stem)):
            if folder != task.staging:
                link(old, new)
        return True
    except (UserError, OSError):
        return False


def link(old: Path, new: Path) -> None:
    """Give a file a second name; a copy where the file system has no links."""
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def make(pair: Pair, contents: list[bytes], source: tuple[int, ...], task: Task) -> Record:
    """Check, shrink and write one pair."""
    recipe, image, mask = task.recipe, task.layout.read_image(pair.image, contents[0]), None
    image_path, mask_path = pair_paths(task.staging, task.split, pair.stem)
    record = Record(pair.stem, source, source_size=image.shape[1::-1])
    if pair.labels:
        labels = task.layout.read_labels(pair.labels, contents[-1], task.class_set)
        if labels.shape != image.shape[:2]:
            sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (image, labels)]
            raise BadFile(f"{pair.labels}: expected the image's size {sizes[0]}, found {sizes[1]}")
        histogram, ids = count_ids(labels), shrink_mask(labels, recipe.size)
        check_ids(histogram, task.class_set, pair.labels)
        mask = task.class_set.lookup[ids]
        counts = [count_classes(h, task.class_set) for h in (histogram, count_ids(ids))]
        write_array(mask_path, lambda buffer: Image.fromarray(mask).save(buffer, format="PNG"))
        by_id = {str(id_): int(histogram[id_]) for id_ in np.flatnonzero(histogram)}
        record = replace(record, full_resolution=counts[0], resized=counts[1], ids=by_id)
        if zlib.crc32(pair.stem.encode(errors="surrogateescape")) % task.every == 0:
            record = replace(record, fit=judge.fit(image, labels), sky=judge.sky_colour(image, labels, task.layout))
    small = shrink(image, recipe.size)
    stored = small if recipe.dtype == "uint8" else (small / np.float32(255)).astype(recipe.dtype)
    write_array(image_path, lambda buffer: np.save(buffer, stored, allow_pickle=False))
    pixels = hashlib.blake2b(small.tobytes(), digest_size=8).hexdigest()
    return replace(record, crc32=checksum(small, mask), pixels=pixels)


def write_array(path: Path, save: Callable[[BytesIO], None]) -> None:
    save(content := BytesIO())
    write_bytes(path, content.getbuffer())


@contextmanager
def open_pool(workers: int, dask: str | None) -> Iterator[Executor]:
    """Worker processes here, or those of a Dask cluster that has this package and the data under the same paths."""
    if dask is None:
        with worker_pool(workers) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise UserError("--dask: expected the package `distributed`, found none; pip install distributed") from None
    try:
        client = Client(dask)
    except (ValueError, OSError) as error:
        raise UserError(f"--dask {dask}: expected a scheduler's address (tcp://host:8786), found: {error}") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=DASK_PATIENCE)
            yield client.get_executor(pure=False)
        except TimeoutError:
            raise UserError(f"{dask}: expected workers, found none in {DASK_PATIENCE} s; start some") from None
        except CancelledError as error:
            raise UserError(f"{dask}: the scheduler has gone ({error}); run the same command to continue") from None
        except KilledWorker as error:
            raise UserError(f"{dask}: workers died repeatedly (out of memory?): {error}") from None


def process_split(pool: Executor, pairs: list[Pair], out: Path, task: Task, reuse: bool) -> list[Record]:
    """Make a split's pairs on the pool, in order; what an earlier run made is taken from `out` or from staging."""
    staging, split = task.staging, task.split
    for path in pair_paths(staging, split, ""):
        make_folder(path.parent)
    earlier = {pair.stem: [] for pair in pairs}
    if reuse:
        for folder, records in ((staging, read_journal(staging, split)), (out, read_made(out, split, task.recipe))):
            for record in records:
                earlier.get(record.stem, []).append((folder, record))
    jobs = [(pair, earlier[pair.stem]) for pair in pairs]
    results = pool.map(partial(process, task=task), jobs, chunksize=max(1, min(16, len(jobs) // 128)))
    records = []
    with open(staging / JOURNAL.format(split), "a", buffering=1, encoding="utf-8") as journal:  # line by line
        for record in tqdm(results, total=len(jobs), desc=split, unit="img", leave=False):
            records.append(record)
            if not record.error:
                journal.write(json.dumps({"stem": record.stem, **record.entry()}) + "\n")
    return records


def read_journal(staging: Path, split: str) -> list[Record]:
    """The pairs that an interrupted run finished; its last line may be cut off."""
    path, records = staging / JOURNAL.format(split), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            records.append(Record(**json.loads(line)))
    return records


def read_made(out: Path, split: str, recipe: Recipe) -> list[Record]:
    """The pairs that a finished run made by the same recipe."""
    path = out / f"stats_{split}.json"
    stats = read_json(path) if path.is_file() else {}
    same = json.loads(json.dumps(asdict(recipe))).items() <= stats.items()
    return [Record(stem, **entry) for stem, entry in stats["files"].items()] if same else []


def check_output(out: Path, data_set: DataSet) -> None:
    """Raise UserError when the output folder holds another source's splits, or leads elsewhere by a link."""
    for folder in (UNFINISHED, "visualizations", *(f"{kind}_processed" for kind in ("images", "masks"))):
        for path in (out / folder, *(out / folder).glob("*")):
            if path.is_symlink():  # into which no file can be moved, where it leads to another disk
                raise UserError(f"{path}: expected a folder of its own, found a link; use another --output_dir")
    splits = [path.stem.removeprefix("stats_") for path in sorted(out.glob("stats_*.json"))]
    made = {split: read_stats(out, split)["files"] for split in splits}
    if made and not any(same_source(data_set, split, files) for split, files in made.items()):
        advice = "use another --output_dir, or delete this one"
        raise UserError(f"{out}: holds splits made from another source than {data_set.root}; {advice}")


def same_source(data_set: DataSet, split: str, files: dict[str, dict]) -> bool:
    """Whether one of the `files` that a split was made from lies, with the same content, in the raw data set."""
    for pair in data_set.pairs(split)[0] if split in data_set.splits else ():
        with suppress(UserError):
            if pair.stem in files and files[pair.stem]["source"][0] == zlib.crc32(read_bytes(pair.image)):
                return True
    return False


def open_staging(out: Path, recipe: Recipe) -> Path:
    """The folder in which splits are made; what an interrupted run made there by another recipe is removed."""
    staging, wanted = out / UNFINISHED, json.loads(json.dumps(asdict(recipe)))
    with suppress(UserError):
        if read_json(staging / "recipe.json") == wanted:
            return staging
    shutil.rmtree(staging, ignore_errors=True)
    write_json(make_folder(staging) / "recipe.json", wanted)
    return staging


def move_into_place(out: Path, splits: list[str]) -> None:
    """Replace the splits of `out` by those made in staging. Raises UserError for a file in the way that is not ours."""
    staging, plan = out / UNFINISHED, {}
    for split in splits:
        path = out / f"stats_{split}.json"
        plan[split] = sorted(read_json(path)["files"]) if path.is_file() else []
        for stem in read_json(staging / path.name)["files"].keys() - set(plan[split]):
            if taken := [path for path in pair_paths(out, split, stem) if path.exists()]:
                raise UserError(f"{taken[0]}: was not made by preprocessing; move it away, or use another --output_dir")
    write_json(staging / "moving.json", plan)  # from here on, an interrupted move is finished by the next run
    finish_moving(out)


def finish_moving(out: Path) -> None:
    """Carry out the move that was planned, wherever it was interrupted."""
    staging = out / UNFINISHED
    if not (staging / "moving.json").is_file():
        return
    for split, old in read_json(staging / "moving.json").items():
        stats = staging / f"stats_{split}.json"
        if not stats.is_file():
            continue  # this split was moved before
        (out / stats.name).unlink(missing_ok=True)  # the split is not there until it is complete
        new = read_json(stats)["files"]
        for stem in set(old) - new.keys():
            for path in pair_paths(out, split, stem):
                path.unlink(missing_ok=True)
        for source, target in zip(pair_paths(staging, split, ""), pair_paths(out, split, "")):
            make_folder(target.parent)
            for path in source.parent.iterdir():
                if path.stem in new:
                    os.replace(path, target.parent / path.name)
        for path in staging.glob(f"visualizations/{split}_*"):
            os.replace(path, make_folder(out / "visualizations") / path.name)
        os.replace(stats, out / stats.name)
    shutil.rmtree(staging)


def write_stats(out: Path, task: Task, records: list[Record], said: dict[str, list[str]]) -> dict:
    """Write stats_<split>.json into staging and return it: settings, what was `said`, pixels, files."""
    good, class_set = [record for record in records if not record.error], task.class_set
    stats = {"format": FORMAT, "split": task.split, **asdict(task.recipe), "val_is_halved": task.layout.val_is_halved}
    stats |= class_set.facts() | {"num_images": len(good)} | said
    if good[0].resized:
        totals = {n: np.sum([getattr(r, n) for r in good], axis=0).tolist() for n in ("full_resolution", "resized")}
        stats["pixels"] = {name: dict(zip([*class_set.names, "void"], total)) for name, total in totals.items()}
    stats["left_out"] = {record.stem: record.error for record in records if record.error}
    stats["files"] = {record.stem: record.entry() for record in good}
    write_json(out / UNFINISHED / f"stats_{task.split}.json", stats)
    return stats


def draw(folder: Path, stats: dict, num_samples: int) -> None:
    """Write visualizations/<split>_class_distribution.png and, with so many images, <split>_samples.jpg."""
    from .. import plots  # here, because every worker imports this file and few of them draw

    class_set, split, stems = stored(stats), stats["split"], list(stats["files"])
    shares = {k.replace("_", " "): np.array([*v.values()]) / sum(v.values()) for k, v in stats["pixels"].items()}
    figure = plots.class_distribution(class_set, shares, f"{split}: {stats['num_images']} images")
    plots.save(figure, folder / "visualizations" / f"{split}_class_distribution.png")
    rows = []
    for place in np.unique(np.linspace(0, len(stems) - 1, num_samples).round().astype(int)):
        image, mask, *_ = read_pair(folder, split, stems[place], len(class_set), tuple(stats["size"]))
        painted = class_set.paint(mask)
        rows.append([image, painted, overlay(image, painted)])
    if rows:
        figure = plots.panels(rows, ["image", "mask", "overlay"], class_set)
        plots.save(figure, folder / "visualizations" / f"{split}_samples.jpg")


def report(split: str, records: list[Record], stats: dict | None) -> None:
    """Log what became of a split: counts, every file left out, the class distribution, classes lost by shrinking."""
    errors, reused = [record.error for record in records if record.error], sum(record.reused for record in records)
    counts = len(records) - reused - len(errors), reused, len(errors)
    log.info("%s: %d images made, %d skipped (already there), %d left out", split, *counts)
    for error in errors:
        log.error("  left out: %s", error)
    if stats is None:
        log.error("%s: nothing usable; what earlier runs made of it stays as it is", split)
        return
    for warning in stats["warnings"]:
        log.warning("  warning: %s", warning)
    (width, height), (wide, high) = next(r.source_size for r in records if not r.error), stats["size"]
    if not 0.95 < width * high / (height * wide) < 1.05:
        kept = f"{2 * round(high * width / height / 2)}x{high}"
        log.info("  %dx%d is squashed to %dx%d; --size %s keeps the shape", width, height, wide, high, kept)
    if "pixels" in stats:
        pixels = stats["pixels"]["full_resolution"]
        total = sum(pixels.values())
        log.info("  %s", " · ".join(f"{name} {100 * count / total:.1f} %" for name, count in pixels.items()))
        for c, name in enumerate(stats["classes"]):
            if lost := sum(r.full_resolution[c] > 0 and r.resized[c] == 0 for r in records if not r.error):
                log.info("  %s vanishes from %d masks at this size", name, lost)


def judge_split(task: Task, records: list[Record]) -> list[str]:
    """Warnings about a split as a whole. Raises UserError when its labels are not what they should be."""
    ids: Counter[int] = Counter()
    for record in records:
        ids.update({int(id_): pixels for id_, pixels in record.ids.items()})
    fits = [record.fit for record in records if record.fit is not None]
    skies = [record.sky for record in records if record.sky is not None]
    found = judge.judge_ids(task.split, task.layout, task.class_set, ids) if ids else []
    return found + judge.judge_pairs(fits, skies)


def judge_together(out: Path, splits: list[str]) -> list[str]:
    """What must be said about splits side by side. Raises UserError when one holds images of another."""
    made = {path.stem.removeprefix("stats_"): read_json(path)["files"] for path in sorted(out.glob("stats_*.json"))}
    made |= {split: read_json(out / UNFINISHED / f"stats_{split}.json")["files"] for split in splits}
    pixels = {split: {stem: e["pixels"] for stem, e in files.items() if "pixels" in e} for split, files in made.items()}
    errors, warnings = judge.judge_duplicates(pixels)
    if errors:
        raise UserError("\n".join(errors))
    return warnings + judge.judge_frames({split: list(files) for split, files in made.items()})


def make_split(pool: Executor, data_set: DataSet, out: Path, task: Task, reuse: bool) -> tuple[list, dict | None]:
    """What became of each pair of a split, in order, and its statistics in staging; None where nothing is usable."""
    pairs, alone = data_set.pairs(task.split)
    records = process_split(pool, pairs, out, task, reuse)
    records = sorted([*records, *(Record(stem, error=e) for stem, e in alone.items())], key=lambda r: r.stem)
    if not records:
        records = [Record(task.split, error=f"{data_set.root}: expected images in the split {task.split}, found none")]
    if all(record.error for record in records):
        return records, None
    said = {"raw": str(data_set.root), "notes": data_set.notes, "warnings": judge_split(task, records)}
    return records, write_stats(out, task, records, said)


def run(args: argparse.Namespace, data_set: DataSet | None = None) -> int:
    """Process every split; returns the number of files left out."""
    out = args.output_dir.absolute()  # Dask's workers run in other folders
    data_set = data_set or find_data(args.data_dir.absolute(), args.coarse, args.given_split)
    layout, class_set = data_set.layout, choose_classes(data_set, args.classes)
    recipe = Recipe(layout.name, class_set.name, class_set.digest(), args.size, args.dtype)
    for note in data_set.notes:
        log.info("%s: %s", data_set.root, note)
    done, left_out, pictures = [], 0, []
    with exclusive(out, wait=True), open_pool(args.workers, args.dask) as pool:
        finish_moving(out)
        check_output(out, data_set)
        splits, staging = choose_splits(data_set, args.splits), open_staging(out, recipe)
        for split in splits:
            number = len(data_set.splits[split][0].by_stem)
            task = Task(staging, split, recipe, layout, class_set, max(1, number // 16))
            records, stats = make_split(pool, data_set, out, task, not args.overwrite)
            report(split, records, stats)
            left_out += sum(bool(record.error) for record in records)
            done += [split] if stats else []
            if stats and "pixels" in stats:  # a worker draws while the others make the next split
                pictures.append(pool.submit(draw, staging, stats, args.sample_size))
        for picture in pictures:
            picture.result()
        for warning in judge_together(out, done):
            log.warning("warning: %s", warning)
        move_into_place(out, done)
    log.info("written to %s: images_processed, masks_processed, stats_*.json, visualizations", args.output_dir)
    return left_out


def choose_classes(data_set: DataSet, asked: str | None) -> ClassSet:
    """The class set asked for, by its name or file; else the data set's own file, or the usual one of its layout."""
    names, own = data_set.layout.class_sets, data_set.class_file
    if asked in names or (asked is None and own is None and names):
        return CLASS_SETS[asked or names[0]]
    if asked is None and own is None:
        advice = f"write a first one by `python -m unetseg classes {data_set.root}`"
        raise UserError(f"{data_set.root}: expected classes.toml, which says what the masks mean, found none; {advice}")
    if asked in CLASS_SETS or (asked and not asked.endswith(".toml")):
        fitting = " or ".join([*names, "a class file (.toml)"])
        raise UserError(f"--classes: expected {fitting} for {data_set.root}, found {asked}")
    class_set = read_class_file(Path(asked) if asked else own)
    if class_set.palette and names:
        raise UserError(f"{asked}: expected ids for each class, as {data_set.layout.name} has them, found colours")
    return class_set


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **options: object) -> None:
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*names, dest=name, **options)

    add("data_dir", type=Path, required=True, help="root of a raw data set")
    add("output_dir", type=Path, required=True, help="the processed folder")
    add("splits", nargs="+", metavar="SPLIT", help="default: train val (CamVid: and test), those that exist")
    add("classes", metavar="NAME|FILE.toml", help=f"class set: {', '.join(CLASS_SETS)}, or a file (default: by layout)")
    add("coarse", action="store_true", help="Cityscapes: gtCoarse's labels in place of gtFine's")
    add("given_split", action="store_true", help="Kaggle's CamVid: keep its split, which mixes neighbouring frames")
    add("size", type=parse_size, default=(256, 256), metavar="N|WxH", help="output size (256)")
    add("dtype", choices=("float32", "float16", "uint8"), default="float32", help="stored images (float32)")
    add("workers", type=whole_number(1, 512), default=os.cpu_count(), help="processes (default: all cores)")
    add("dask", metavar="ADDRESS", help="use this Dask cluster (its scheduler); workers need this package installed")
    add("sample_size", type=whole_number(0, 100), default=5, metavar="N", help="samples drawn per split (5)")
    add("log_level", default="INFO", type=str.upper, choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    add("overwrite", action="store_true", help="make everything anew")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, data_set: DataSet | None = None) -> int:
    """The command; with `data_set`, on that in place of what --data_dir holds."""
    args = parse_args(argv)
    logging.basicConfig(level=args.log_level, format="%(message)s", stream=sys.stderr, force=True)
    try:
        with logging_redirect_tqdm():
            left_out = run(args, data_set)
    except (UserError, BrokenProcessPool) as error:
        died = "a worker process died (out of memory?); run again with fewer --workers"
        log.error("error: %s", died if isinstance(error, BrokenProcessPool) else error)
        return 1
    except KeyboardInterrupt:
        log.error("interrupted; the same command continues from here")
        return 130
    if left_out:
        log.error("%d files were left out (listed above and in stats_*.json); the rest is done", left_out)
    return 1 if left_out else 0
