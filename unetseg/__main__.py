"""python -m unetseg preprocess | scenes | train | resume | evaluate | compare | plan | predict | export | page | ..."""

import os
import signal

if __name__ == "__main__":  # an exception in the middle of torch's imports would be taken for an error of theirs
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os._exit(128 + number))

import argparse
import atexit
import importlib
import shlex
import sys
import threading
import warnings
from pathlib import Path
from typing import NoReturn

from . import __version__
from .files import UserError
from .settings import KNOBS, Settings, SettingsError, add_flags, complete
from .tools import parse_size, whole_number

SPLITS = ("test", "val", "val_all", "train", "fold0", "fold1", "fold2", "fold3")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unetseg", description="Street-scene segmentation with a U-Net.")
    parser.add_argument("--version", action="version", version=f"unetseg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("preprocess", help="raw data -> processed folder", add_help=False)  # has a parser of its own
    add = commands.add_parser("scenes", help="draw street scenes in the Cityscapes layout").add_argument
    add("out", type=Path)
    add("--train", type=whole_number(0, 100_000), default=64, metavar="N", help="training scenes (64)")
    add("--val", type=whole_number(0, 100_000), default=40, metavar="N", help="val scenes (40)")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0)
    add("--size", type=parse_size, default=(1024, 512), metavar="WxH", help="1024x512")
    add_flags(commands.add_parser("train", help="train a run; the same command resumes it"))
    commands.add_parser("resume", help="resume a run by its config.json").add_argument("run", type=Path)
    add_evaluation(commands)
    add_show(commands)
    add = commands.add_parser("plan", help="train and score the rows of a plan, or resume it").add_argument
    add("plan", type=Path, metavar="PLAN.toml")
    add("--data", type=Path, required=True, help="processed folder")
    add("--out", type=Path, required=True, help="folder of the runs")
    add("--results", type=Path, help="folder of the small results files (OUT/results)")
    add("--max-minutes", type=float, default=float("inf"), help="stop in time, with everything saved")
    add = commands.add_parser("classes", help="write a first class file for your own images and masks").add_argument
    add("folder", type=Path, help="with a folder of images and one of masks")
    add("--out", type=Path, help="default: classes.toml in the folder")
    add = commands.add_parser("doctor", help="what this machine has, and how long training will take").add_argument
    add("--data", type=Path, help="a processed folder, or a raw data set")
    return parser


def add_evaluation(commands: argparse._SubParsersAction) -> None:
    add = commands.add_parser("evaluate", help="score a run, write results_<split>.json").add_argument
    add("run", type=Path)
    add("--data", type=Path, required=True, help="processed folder")
    add("--split", choices=SPLITS, help="default: the run's fold; else test, or val where there is none")
    add("--official", type=Path, metavar="OUT", help="also as Cityscapes' benchmark scores; predictions go to OUT")
    add("--raw", type=Path, help="for --official: the raw data, where they have moved")
    add("--robustness", action="store_true", help="also under occluders and common corruptions")
    add = commands.add_parser("compare", help="whether scored runs differ, with intervals").add_argument
    add("base", type=Path, nargs="+", metavar="RUN", help="the base: one run, or the seeds of one recipe")
    add("--to", type=Path, nargs="+", action="append", required=True, metavar="RUN", help="runs to compare; repeatable")
    add("--split", choices=SPLITS)


def add_show(commands: argparse._SubParsersAction) -> None:
    add = commands.add_parser("predict", help="class ids, colours and overlay for pictures and videos").add_argument
    add("weights", type=Path, metavar="RUN_OR_WEIGHTS")
    add("images", type=Path, nargs="+", metavar="FILE_OR_FOLDER")
    add("--out", type=Path, required=True)
    add("--tiles", type=whole_number(1, 16), default=1, metavar="N", help="look at N x N overlapping windows (1)")
    add("--flip", action="store_true", help="average over each picture and its mirror image")
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="auto: by rule for the device")
    add = commands.add_parser("export", help="a network as an ONNX file, checked against PyTorch").add_argument
    add("weights", type=Path, metavar="RUN_OR_WEIGHTS")
    add("--onnx", type=Path, required=True, metavar="FILE")
    add = commands.add_parser("page", help="a folder with a page that runs networks in the browser").add_argument
    add("weights", type=Path, nargs="+", metavar="RUN_OR_WEIGHTS")
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--serve", type=whole_number(1, 65_535), metavar="PORT", help="serve it on localhost afterwards")


def listen() -> None:
    """From here on, when everything is imported, signals are exceptions."""
    handlers = signal.default_int_handler, lambda number, frame: sys.exit(128 + number)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def say(text: str) -> None:
    """Print a line; work goes on when nobody reads stdout any more."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def train(args: argparse.Namespace) -> None:
    from . import checkpoint, run

    given = {name: getattr(args, name) for name in KNOBS if getattr(args, name, None) is not None}
    if args.command == "resume":
        given = complete(checkpoint.read_config(args.run)["settings"]) | {"out": args.run}
    elif {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} <= os.environ.keys():  # each trial of a sweep has a folder of its own
        given["out"] = Path(given["out"], os.environ["WANDB_RUN_ID"])
    say(f"{run.summary(run.train(Settings(**given)))}; see {given['out']}")


def scenes(args: argparse.Namespace) -> None:
    from .tools.scenes import draw_dataset

    draw_dataset(args.out, {"train": args.train, "val": args.val}, args.size, args.seed)
    train, val = (len([*args.out.glob(f"leftImg8bit/{split}/drawn/*.png")]) for split in ("train", "val"))
    say(f"{train} train and {val} val scenes of {args.size[0]}x{args.size[1]}, seed {args.seed}, in {args.out}")
    say(f"next: python -m unetseg preprocess --data-dir {shlex.quote(str(args.out))} --output-dir processed")


def evaluate(args: argparse.Namespace) -> None:
    from .evaluation import evaluate_run, results_table

    results = evaluate_run(args.run, args.data, args.split)
    say(results_table(results))
    if args.official:
        from .evaluation.official import official_table, score_officially

        say(official_table(score_officially(args.run, args.data, args.official, results["split"], args.raw)))
    if args.robustness:
        from .evaluation.robustness import robustness, robustness_table

        say(robustness_table(robustness(args.run, args.data, results["split"])))


def compare(args: argparse.Namespace) -> None:
    from .evaluation.compare import compare_runs, verdict_line

    others = {str(runs[0]): runs for runs in args.to}
    for name, found in compare_runs(args.base, others, args.split).items():
        say(verdict_line(name, found))


def predict(args: argparse.Namespace) -> int:
    from .show.predict import Predictor, predict_files, remarks

    predictor = Predictor(args.weights, args.precision, args.tiles, args.flip)
    rows, problems = predict_files(predictor, args.images, args.out)
    for line in [*problems, *(f"note: {remark}" for remark in remarks(predictor, rows.values()))]:
        print(line, file=sys.stderr)
    written = f"{len(rows)} written to {args.out} (shares.csv lists them)" if rows else "nothing written"
    say(f"{written}, {len(problems)} left out" if problems else written)
    return 1 if problems else 0


def export(args: argparse.Namespace) -> None:
    from .show.export import export_onnx

    found = export_onnx(args.weights, args.onnx)
    like = f"differ by at most {found['difference']:.1e}, {found['agreement']:.3%} of the pixels have the same class"
    say(f"{args.onnx}: {found['bytes'] / 2**20:.1f} MiB; against PyTorch logits {like}")


def page(args: argparse.Namespace) -> None:
    from .show.page import make_page, serve

    say(make_page(args.weights, args.out))
    if args.serve:
        serve(args.out, args.serve)


def doctor(args: argparse.Namespace) -> int:
    from .tools.doctor import examine

    return examine(args.data)


def classes(args: argparse.Namespace) -> None:
    from .tools.class_files import write_class_file

    say(write_class_file(args.folder, args.out))


def plan(args: argparse.Namespace) -> None:
    from .tools.plan import plan_table, run_plan

    say(plan_table(run_plan(args.plan, args.data, args.out, args.results or args.out / "results", args.max_minutes)))


COMMANDS = {  # the function of each, and the module with what takes long to import
    "train": (train, "run"), "resume": (train, "run"), "scenes": (scenes, "tools.scenes"),
    "evaluate": (evaluate, "evaluation"), "compare": (compare, "evaluation"), "plan": (plan, "tools.plan"),
    "predict": (predict, "show.predict"), "export": (export, "show.export"), "page": (page, "show.page"),
    "doctor": (doctor, "tools.doctor"), "classes": (classes, "tools.class_files"),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:  # of several processes one speaks
        os.environ["TQDM_DISABLE"] = "1"
    warnings.showwarning = lambda message, *where, **more: print(f"warning: {message}", file=sys.stderr)
    try:
        if argv[:1] == ["preprocess"]:
            from .tools import preprocess

            listen()
            return preprocess.main(argv[1:])
        args = build_parser().parse_args(argv)
        run, module = COMMANDS[args.command]
        importlib.import_module(f".{module}", __package__)
        listen()
        return run(args) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130


def leave(status: int) -> NoReturn:
    """End this process; one of several skips the last clean-up, in which gloo may abort (pytorch/pytorch#179291)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1":
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    leave(main())
