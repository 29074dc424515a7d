"""Turn raw Cityscapes or CamVid into the processed folder that training reads.

    python preprocessing/image_segmentation_preprocessing.py --data_dir RAW --output_dir PROCESSED

writes images_processed/<split>/<stem>.npy, masks_processed/<split>/<stem>.png, stats_<split>.json and visualizations/.
Each mask carries, as PNG text, the settings and source files it was made from: a rerun redoes only what is missing or
differs. A bad file is reported and left out, the rest goes on, and the exit status is then 1.
"""

import argparse
import json
import logging
import os
import signal
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # what OpenCV would say of a broken file, we say with its name
import cv2
import numpy as np
from PIL import Image, PngImagePlugin
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

WORKERS_WITHIN = 60  # seconds that a Dask cluster may take to have its first worker
PLACES = [Path(__file__).resolve().parents[1], Path(__file__).resolve().parent]  # of unetseg, and of this file
sys.path.insert(0, str(PLACES[0]))
from unetseg.classes import CLASS_SETS, IGNORE_INDEX, ClassSet
from unetseg.files import atomic_open, exclusive, read_bytes, write_json
from unetseg.pictures import BadFile, overlay, read_png
from unetseg.pool import ctrl_c_for_us_alone, worker_pool
from unetseg.processed import to_uint8
from unetseg.raw import DEFAULT_CLASSES, Pair, choose_splits, find_layout, list_pairs

log = logging.getLogger("preprocessing")


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the output."""

    class_set: str
    size: tuple[int, int]  # width, height
    dtype: str


@dataclass(frozen=True)
class Record:
    """What became of one pair; the counts are pixels per class, void last."""

    stem: str
    source_size: tuple[int, int] = (0, 0)
    full_resolution: list[int] = field(default_factory=list)
    resized: list[int] = field(default_factory=list)
    reused: bool = False
    error: str = ""


def shrink_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Average areas down to `size` (width, height); uint8 in, uint8 out (enlarging interpolates linearly)."""
    shrinks = image.shape[1] >= size[0] and image.shape[0] >= size[1]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def shrink_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Take the source pixel under each target pixel's centre (OpenCV's INTER_NEAREST takes the top-left one)."""
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
    """Raise BadFile when a label file holds ids that the table does not know."""
    unknown = np.flatnonzero((histogram > 0) & ~class_set.known).tolist()
    if unknown:
        highest = int(np.flatnonzero(class_set.known).max())
        hint = "; 255 never occurs in label ids: are these trainIds?" if unknown == [IGNORE_INDEX] else ""
        raise BadFile(f"{path}: expected label ids 0..{highest}, found {unknown}{hint}")


def process(pair: Pair, split: str, output: Path, settings: Settings, overwrite: bool) -> Record:
    """Make one image and its mask, or find that they are there already; a bad file ends in Record.error."""
    image_path = output / "images_processed" / split / f"{pair.stem}.npy"
    mask_path = output / "masks_processed" / split / f"{pair.stem}.png"
    cv2.setNumThreads(1)
    try:
        sources = [path.stat() for path in (pair.image, pair.labels) if path]
        origin = asdict(settings) | {"sources": [(source.st_size, source.st_mtime_ns) for source in sources]}
        made = None if overwrite else find_made(pair, image_path, mask_path, settings, origin)
        return made or make(pair, image_path, mask_path, settings, origin)
    except BadFile as error:
        return Record(pair.stem, error=str(error))
    except (OSError, MemoryError, cv2.error) as error:
        where = error.filename if isinstance(error, OSError) and error.filename else pair.image
        return Record(
            pair.stem, error=f"{where}: {getattr(error, 'strerror', None) or f'{type(error).__name__} {error}'}"
        )


def find_made(pair: Pair, image_path: Path, mask_path: Path, settings: Settings, origin: dict) -> Record | None:
    """The record of an earlier run's files, if they are there, whole, and made from the same settings and sources."""
    try:
        if pair.labels is None:
            image = np.load(image_path, mmap_mode="r", allow_pickle=False)
            same = image.shape == (*settings.size[::-1], 3) and image.dtype == settings.dtype
            newer = image_path.stat().st_mtime_ns >= pair.image.stat().st_mtime_ns
            return Record(pair.stem, reused=True) if same and newer else None
        note = json.loads(read_png(mask_path, "L")[1]["unetseg"])
        checks = {"origin": json.loads(json.dumps(origin)), "image_crc32": zlib.crc32(read_bytes(image_path))}
        counts = {key: note[key] for key in ("source_size", "full_resolution", "resized")}
        return Record(pair.stem, **counts, reused=True) if checks.items() <= note.items() else None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None


def make(pair: Pair, image_path: Path, mask_path: Path, settings: Settings, origin: dict) -> Record:
    """Read, check, shrink and write one pair; the mask comes last and vouches for the image."""
    class_set, record = CLASS_SETS[settings.class_set], Record(pair.stem)
    image, _ = read_png(pair.image, "RGB")
    if pair.labels:
        labels, _ = read_png(pair.labels, "L")
        if labels.shape != image.shape[:2]:
            sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (image, labels)]
            raise BadFile(f"{pair.labels}: expected the image's size {sizes[0]}, found {sizes[1]}")
        histogram = count_ids(labels)
        check_ids(histogram, class_set, pair.labels)
        small = shrink_mask(labels, settings.size)
        resized = count_classes(count_ids(small), class_set)
        record = Record(pair.stem, image.shape[1::-1], count_classes(histogram, class_set), resized)
    mask_path.unlink(missing_ok=True)
    crc32 = save_image(image_path, shrink_image(image, settings.size), settings.dtype)
    if pair.labels:
        save_mask(mask_path, class_set.lookup[small], record, {"origin": origin, "image_crc32": crc32})
    return record


def save_image(path: Path, image: np.ndarray, dtype: str) -> int:
    """Store a (H, W, 3) uint8 image as k/255 in a float dtype, or k itself in uint8; returns the file's CRC-32."""
    stored, content = image if dtype == "uint8" else (image / np.float32(255)).astype(dtype), BytesIO()
    np.save(content, stored, allow_pickle=False)
    with atomic_open(path) as file:
        file.write(content.getbuffer())
    return zlib.crc32(content.getbuffer())


def save_mask(path: Path, mask: np.ndarray, record: Record, origin: dict) -> None:
    """Store class ids with a note of where they come from, what the source held, and the image's checksum."""
    kept, content, note = ("source_size", "full_resolution", "resized"), BytesIO(), PngImagePlugin.PngInfo()
    note.add_text("unetseg", json.dumps(origin | {key: getattr(record, key) for key in kept}))
    Image.fromarray(mask).save(content, format="PNG", pnginfo=note)
    with atomic_open(path) as file:
        file.write(content.getbuffer())


@contextmanager
def open_pool(workers: int, dask: str | None) -> Iterator[Executor]:
    """Worker processes here, or those of a Dask cluster, whose machines have data and code under the same paths."""
    if dask is None:
        with worker_pool(workers) as pool:
            try:
                yield pool
            except (KeyboardInterrupt, SystemExit):
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return
    try:
        from distributed import Client, KilledWorker, WorkerPlugin
    except ImportError:
        raise BadFile("--dask: expected the package `distributed`, found none; pip install distributed") from None

    class Paths(WorkerPlugin):
        """Lets each worker, also one that replaces a dead one, find this code."""

        def __init__(self, code: str) -> None:
            self.code = code

        def setup(self, worker: object) -> None:
            exec(self.code)

    find_code = f"import sys; sys.path[:0] = {[str(folder) for folder in PLACES]}"
    try:
        client = Client(dask)
    except (ValueError, OSError) as error:
        raise BadFile(f"--dask {dask}: expected a scheduler's address (tcp://host:8786), found: {error}") from None
    with client:
        client.run_on_scheduler(exec, find_code)  # it unpacks the tasks that it passes on
        client.register_plugin(Paths(find_code))
        try:
            client.wait_for_workers(1, timeout=WORKERS_WITHIN)
        except TimeoutError:
            raise BadFile(f"{dask}: expected workers, found none in {WORKERS_WITHIN} s; start some") from None
        try:
            yield client.get_executor(pure=False)
        except CancelledError as error:
            raise BadFile(f"{dask}: the scheduler has gone ({error}); the same command goes on from here") from None
        except KilledWorker as error:
            raise BadFile(f"{dask}: workers died again and again (out of memory?): {error}") from None


def process_split(pool: Executor, split: str, pairs: list[Pair], **job) -> list[Record]:
    """Process all pairs of a split on the pool, in order, under a progress bar."""
    with ctrl_c_for_us_alone():
        results = pool.map(partial(process, split=split, **job), pairs, chunksize=max(1, min(16, len(pairs) // 128)))
    return list(tqdm(results, total=len(pairs), desc=split, unit="img", leave=False))


def edge_cases(records: list[Record], class_set: ClassSet) -> dict:
    """What a reader of the statistics should know of: absent classes, classes lost by shrinking, odd images."""
    full = np.array([record.full_resolution for record in records])
    small = np.array([record.resized for record in records])
    stems = np.array([record.stem for record in records])
    present, share = full > 0, full / full.sum(axis=1, keepdims=True)
    return {
        "images_without_class": {name: int((~present[:, c]).sum()) for c, name in enumerate(class_set.names)},
        "lost_by_shrinking": {
            name: stems[present[:, c] & (small[:, c] == 0)].tolist() for c, name in enumerate(class_set.names)
        },
        "images_of_one_class": stems[present[:, :-1].sum(axis=1) == 1].tolist(),
        "images_over_half_void": stems[share[:, -1] > 0.5].tolist(),
    }


def write_stats(output: Path, split: str, layout: str, settings: Settings, records: list[Record]) -> dict:
    """Write stats_<split>.json and return it: settings, pixels per class, edge cases, files, what was left out."""
    class_set = CLASS_SETS[settings.class_set]
    good = [record for record in records if not record.error]
    stats = {"split": split, "layout": layout, **asdict(settings), "classes": class_set.names, "num_images": len(good)}
    if good and good[0].resized:
        keys = [*class_set.names, "void"]
        for name in ("full_resolution", "resized"):
            total = np.sum([getattr(record, name) for record in good], axis=0)
            stats.setdefault("pixels", {})[name] = dict(zip(keys, total.tolist(), strict=True))
        stats["edge_cases"] = edge_cases(good, class_set)
    stats["left_out"] = {record.stem: record.error for record in records if record.error}
    columns = ("source_size", "full_resolution", "resized")
    stats["files"] = {record.stem: {key: list(getattr(record, key)) for key in columns} for record in good}
    write_json(output / f"stats_{split}.json", stats)
    remove_stale(output, split, stats["files"].keys())
    return stats


def remove_stale(output: Path, split: str, stems: Collection[str]) -> None:
    """Delete what earlier runs made of sources that have gone or have become unusable since."""
    for folder, suffix in (("images_processed", ".npy"), ("masks_processed", ".png")):
        stale = [path for path in (output / folder / split).glob(f"*{suffix}") if path.stem not in stems]
        for path in stale:
            path.unlink()
        if stale:
            log.warning("%s: removed %d files from %s whose sources are gone or unusable", split, len(stale), folder)


def draw_distribution(output: Path, stats: dict) -> None:
    """Write visualizations/<split>_class_distribution.png."""
    from unetseg import plots  # here and below, because every worker imports this file and few of them draw

    total = {name: np.array(list(pixels.values())) for name, pixels in stats["pixels"].items()}
    shares = {f"{name.replace('_', ' ')}": pixels / pixels.sum() for name, pixels in total.items()}
    title = f"{stats['split']}: {stats['num_images']} images"
    figure = plots.class_distribution(CLASS_SETS[stats["class_set"]], shares, title)
    plots.save(figure, output / "visualizations" / f"{stats['split']}_class_distribution.png")


def draw_samples(output: Path, split: str, class_set: ClassSet, stems: list[str]) -> None:
    """Write visualizations/<split>_samples.jpg with the images of these stems, their masks, and both as one."""
    from unetseg import plots

    rows = []
    for stem in stems:
        image = to_uint8(np.load(output / "images_processed" / split / f"{stem}.npy", allow_pickle=False))
        painted = class_set.paint(np.array(Image.open(output / "masks_processed" / split / f"{stem}.png")))
        rows.append([image, painted, overlay(image, painted)])
    figure = plots.panels(rows, ["image", "mask", "overlay"], class_set)
    plots.save(figure, output / "visualizations" / f"{split}_samples.jpg")


def start_drawing(pool: Executor, output: Path, stats: dict, num_samples: int) -> list[Future]:
    """Let the workers draw a split while they go on with the next."""
    pictures = [pool.submit(draw_distribution, output, {key: stats[key] for key in stats.keys() - {"files"}})]
    if num_samples:
        stems = list(stats["files"])
        places = np.unique(np.linspace(0, len(stems) - 1, num_samples).round().astype(int))
        chosen = [stems[place] for place in places]
        pictures.append(pool.submit(draw_samples, output, stats["split"], CLASS_SETS[stats["class_set"]], chosen))
    return pictures


def report_errors(split: str, records: list[Record]) -> None:
    """Log how many pairs of a split came to what, and every file left out."""
    errors = [record.error for record in records if record.error]
    reused = sum(record.reused for record in records)
    made = len(records) - reused - len(errors)
    log.info("%s: %d images made, %d skipped (already there), %d left out", split, made, reused, len(errors))
    for error in errors:
        log.error("  left out: %s", error)


def report(stats: dict) -> None:
    """Log a split's class distribution, and classes lost by shrinking."""
    if "pixels" not in stats:
        return
    pixels = stats["pixels"]["full_resolution"]
    total = sum(pixels.values())
    log.info("  %s", " · ".join(f"{name} {100 * count / total:.1f} %" for name, count in pixels.items()))
    for name, stems in stats["edge_cases"]["lost_by_shrinking"].items():
        if stems:
            log.info("  %s vanishes from %d masks at this size", name, len(stems))


def parse_size(text: str) -> tuple[int, int]:
    """Read "256" or "512x256" (width x height) as (width, height)."""
    width, _, height = text.partition("x")
    size = (int(width), int(height or width))
    if not 8 <= min(size) <= max(size) <= 8192:
        raise ValueError(text)
    return size


def at_least(lowest: int) -> Callable[[str], int]:
    """A parser of whole numbers from `lowest` on."""

    def whole_number(text: str) -> int:
        if int(text) < lowest:
            raise ValueError(text)
        return int(text)

    return whole_number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, help="root of raw Cityscapes or CamVid")
    add("--output_dir", type=Path, required=True, help="the processed folder")
    add("--splits", nargs="+", metavar="SPLIT", help="default: train val (CamVid: and test), those that exist")
    add("--classes", choices=CLASS_SETS, help="class set (default: cityscapes7 or camvid7, by layout)")
    add("--size", type=parse_size, default=(256, 256), metavar="N|WxH", help="output size (256)")
    add("--dtype", choices=("float32", "float16", "uint8"), default="float32", help="stored images (float32)")
    add("--workers", type=at_least(1), default=os.cpu_count(), help="processes (default: all cores)")
    add("--dask", metavar="ADDRESS", help="work on this Dask cluster instead (its scheduler; needs `distributed`)")
    add(
        "--sample_size",
        type=at_least(0),
        default=5,
        metavar="N",
        help="samples drawn into visualizations/ per split (5)",
    )
    add("--log_level", default="INFO", type=str.upper, choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    add("--overwrite", action="store_true", help="redo what is already there")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Process every split; returns the number of files left out."""
    if args.dask:  # the workers have been started elsewhere
        args.data_dir, args.output_dir = args.data_dir.absolute(), args.output_dir.absolute()
    layout = find_layout(args.data_dir)
    settings = Settings(args.classes or DEFAULT_CLASSES[layout], args.size, args.dtype)
    if CLASS_SETS[settings.class_set].layout != layout:
        raise BadFile(f"{args.data_dir}: expected a class set for {layout}, found --classes {settings.class_set}")
    splits = choose_splits(args.data_dir, layout, args.splits)
    left_out, pictures = 0, []
    written = ("*_processed/*", "visualizations")
    with exclusive(args.output_dir, wait=True, below=written), open_pool(args.workers, args.dask) as pool:
        for split in splits:
            pairs, alone = list_pairs(args.data_dir, layout, split)
            records = [Record(stem, error=error) for stem, error in alone.items()]
            if not pairs and not records:
                records.append(
                    Record(split, error=f"{args.data_dir}: expected images in the split {split}, found none")
                )
            job = {"output": args.output_dir, "settings": settings, "overwrite": args.overwrite}
            records += process_split(pool, split, pairs, **job)
            report_errors(split, records)
            left_out += sum(bool(record.error) for record in records)
            if all(record.error for record in records):
                log.error("%s: nothing usable; what earlier runs made of it is left as it is", split)
                continue
            stats = write_stats(args.output_dir, split, layout, settings, sorted(records, key=lambda r: r.stem))
            report(stats)
            if "pixels" in stats:
                pictures += start_drawing(pool, args.output_dir, stats, args.sample_size)
        for picture in pictures:
            picture.result()
    log.info("written to %s: images_processed, masks_processed, stats_*.json, visualizations", args.output_dir)
    return left_out


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=args.log_level, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with logging_redirect_tqdm():
            left_out = run(args)
    except (BadFile, OSError) as error:
        log.error("error: %s", error)
        return 1
    except BrokenProcessPool:
        log.error("error: a worker process died (out of memory?); rerun with fewer --workers")
        return 1
    except KeyboardInterrupt:
        log.error("interrupted; the same command goes on from here")
        return 130
    if left_out:
        log.error("%d files were left out (listed above and in stats_*.json); the rest is done", left_out)
    return 1 if left_out else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
