"""python -m unetseg scenes | train | evaluate | predict | doctor"""

import argparse
import atexit
import os
import signal
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

STARTED = time.monotonic()


def parse_size(text: str) -> tuple[int, int]:
    """Read "1024x512" (width x height), or "256" for a square; at least 64 pixels each."""
    width, _, height = text.partition("x")
    size = int(width), int(height or width)
    if min(size) < 64:
        raise ValueError(text)
    return size


def count(text: str) -> int:
    """Read a number of things, 0 or more."""
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unetseg", description="Street-scene segmentation with a U-Net.")
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("scenes", help="draw street scenes in the Cityscapes layout").add_argument
    add("out", type=Path)
    add("--train", type=count, default=64, metavar="N", help="training scenes (64)")
    add("--val", type=count, default=40, metavar="N", help="val scenes (40)")
    add("--seed", type=int, default=0)
    add("--size", type=parse_size, default=(1024, 512), metavar="WxH", help="1024x512")

    command = commands.add_parser("train", help="train one stage, or go on with it")
    command.add_argument("stage", choices=("scratch", "weighted_ce", "ce_dice"))
    add_settings(command)

    add = commands.add_parser("evaluate", help="score a run, write results_<split>.json").add_argument
    add("run", type=Path)
    add("--data", type=Path, required=True, help="processed folder")
    add("--split", choices=("test", "val", "val_all", "train"), help="default: test, or val where there is none")

    add = commands.add_parser("predict", help="class ids, colours and overlay for images").add_argument
    add("weights", type=Path, metavar="RUN_OR_WEIGHTS")
    add("images", type=Path, nargs="+", metavar="IMAGE_OR_FOLDER")
    add("--out", type=Path, required=True)
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="auto: measured")

    add = commands.add_parser("doctor", help="what is here, what it can do, how long training will take").add_argument
    add("--data", type=Path, help="a processed folder, or a raw Cityscapes or CamVid")
    return parser


def add_settings(command: argparse.ArgumentParser) -> None:
    """One flag for each of the training settings; what is not given keeps the setting's own default."""
    add = command.add_argument
    add("--data", required=True, help="processed folder")
    add("--out", required=True, help="run folder")
    add("--init", metavar="RUN_OR_WEIGHTS", help="what a fine-tuning starts from")
    for name, kind, text in (
        ("epochs", int, "passes over the training images (100; fine-tunings 30)"),
        ("batch-size", int, "images per step, of all processes together (8)"),
        ("lr", float, "peak learning rate (3e-3; fine-tunings 1e-3)"),
        ("weight-decay", float, "0.01"),
        ("channels", int, "width of the first level (32)"),
        ("depth", int, "number of downsamplings (4)"),
        ("seed", int, "0"),
        ("dice-share", float, "share of Dice in ce_dice (0.5)"),
        ("occlusion", float, "share of images with an occluder (0.5)"),
        ("aimed", float, "share of occluders placed on an instance (0.5)"),
        ("project", str, "W&B project (unetseg)"),
        ("num-processes", int, "that train together on this machine, one per GPU (1)"),
        ("max-minutes", float, "stop, saved, before so many have passed; the same command then goes on"),
    ):
        add(f"--{name}", type=kind, help=text)
    add("--aim-at", nargs="*", metavar="CLASS", help="classes of those instances (people)")
    add("--void", choices=("ignore", "background"), help="void rule (ignore)")
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), help="auto: measured")
    add("--memory-format", choices=("auto", "channels_last", "contiguous"), help="auto: measured")
    add("--compile", choices=("auto", "yes", "no"), help="auto: on a GPU, where it works and the run would repay it")
    add("--weighting", choices=("sqrt", "inverse", "median", "enet", "none"), help="class weights (sqrt: 1/√f)")
    add("--occluded", choices=("keep", "void"), help="covered pixels keep their class, or become void (keep)")
    add("--deterministic", action="store_true", help="on a GPU: the same bits in every run, for some speed")


def scenes(args: argparse.Namespace) -> int:
    from .scenes import draw_dataset

    draw_dataset(args.out, {"train": args.train, "val": args.val}, args.size, args.seed)
    return 0


def train(args: argparse.Namespace) -> int:
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}  # before torch imports tqdm, which looks at it
    from . import processes

    processes.begin()
    return train_stage(args)


def train_stage(args: argparse.Namespace) -> int:
    from . import stages
    from .data import class_weights, weights_table
    from .settings import STAGES, Settings, SettingsError, resolve

    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name) is not None}
    try:
        settings = resolve(Settings(**given))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    train_set, val_set = stages.load_sets(settings)
    print(f"train: {train_set.split.note}; val: {val_set.split.note}")
    if STAGES[settings.stage].weighted:
        print(weights_table(train_set, class_weights(train_set.num_pixels, settings.weighting)))
    try:
        history = stages.train(settings, train_set, val_set, STARTED)
    except stages.OutOfTime as out:
        print(out)
        return 0
    best = max(history, key=lambda row: row["val_miou"])
    where = f"at epoch {best['epoch']:.0f} of {settings.epochs}"
    print(f"best val mIoU {best['val_miou']:.4f} (void={settings.void}) {where}")
    print(f"written to {settings.out}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from .inference import evaluate_run, results_table

    print(results_table(evaluate_run(args.run, args.data, args.split)))
    return 0


def predict(args: argparse.Namespace) -> int:
    from .inference import predict_files

    problems = predict_files(args.weights, args.images, args.out, args.precision)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"written to {args.out}: ids, colour, overlay")
    return 1 if problems else 0


def doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    return examine(args.data)


def show_warning(message: Warning, *where: object, **more: object) -> None:
    """Show a warning as a line of its own, not where in the code it came from."""
    from tqdm import tqdm

    tqdm.write(f"warning: {message}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    warnings.showwarning = show_warning
    try:
        commands = {"scenes": scenes, "train": train, "evaluate": evaluate, "predict": predict, "doctor": doctor}
        return commands[args.command](args)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def leave(status: int) -> NoReturn:
    """End this process; one of several without Python's last steps, in which gloo's threads may abort it.

    See pytorch/pytorch#179291; destroying the process group first does not end them where the optimiser was imported.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit._run_exitfuncs()  # multiprocessing's, say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    leave(main())
