"""A plan: rows of settings x seeds x folds, each trained, scored into one small file, and summed up in one table.

A plan is a TOML file with `name`, `precision`, `seeds`, `folds` (without them a run trains on the whole of train), what
all rows share under [settings], and a table [rows.<name>] each: a `title` and settings, of which `init` names an
earlier row, whose run of the same seed and fold it starts from, or else a file of weights. Rows with `control` are
compared with that row.
"""

import json
import shutil
import time
import tomllib
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from .. import checkpoint
from ..data import Batches, SegmentationSet, load_split
from ..device import pick_device
from ..evaluation import difference, evaluate_run, headline, joined, verdicts
from ..evaluation.compare import pooled_miou, read_confusions, time_blocks, verdict_line
from ..evaluation.details import mean
from ..evaluation.robustness import unseen_occluders
from ..files import UserError, atomic_open, make_folder, read_bytes, write_json
from ..inference import trained_model
from ..metrics import confusion_matrices, iou, scores, under_rule
from ..run import train
from ..settings import FREE, INHERITED, KNOBS, Settings, check, complete
from ..train import forward

ALL = ("name", "precision", "seeds", "folds", "settings", "rows")
ROW = ("title", "control", *KNOBS)
KEPT = ("split", "split_note", "size", "trained_void", "device", "torch", "commit", "precision", "epochs")
KEPT += ("train_seconds", "parameters", "images", "data_sha256")


@dataclass(frozen=True)
class Job:
    """One run of a plan: a row under a seed, trained without a fold (None: on all of train)."""

    row: str
    seed: int
    fold: int | None

    @property
    def name(self) -> str:
        return f"{self.row}-seed{self.seed}" + (f"-fold{self.fold}" if self.fold is not None else "")


def read_plan(path: Path) -> dict:
    """The plan in a TOML file. Raises UserError for names that are unknown, and for values that no setting takes."""
    try:
        plan = {"folds": [None], "settings": {}, **tomllib.loads(read_bytes(path).decode())}
        rows = plan["rows"]
        unknown = [*(set(plan) - {*ALL}), *(set(plan["settings"]) - {*KNOBS})]
        unknown += [f"{name}.{key}" for name, row in rows.items() for key in set(row) - {*ROW}]
        if unknown or not (rows and plan["seeds"] and plan["precision"] and plan["name"]):
            raise ValueError(f"the unknown {', '.join(unknown)}" if unknown else "a plan without rows or seeds")
        for place, (name, row) in enumerate(rows.items()):
            for key in {"init", "control"} & {*row}:
                known = list(rows)[: place if key == "init" else None]
                if row[key] not in known and not (key == "init" and Path(row[key]).is_file()):
                    raise ValueError(f"{name}.{key}, which names no {'earlier ' * (key == 'init')}row: {row[key]!r}")
            check(settings_of(plan, Job(name, plan["seeds"][0], plan["folds"][0]), Path(), Path()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: expected a plan as docs/plans.md describes it, found {found}") from None
    return plan


def jobs_of(plan: dict) -> list[Job]:
    """Every run, whole rows first seed by seed, so that an early end leaves rows that can be compared."""
    return [Job(row, seed, fold) for seed in plan["seeds"] for row in plan["rows"] for fold in plan["folds"]]


def settings_of(plan: dict, job: Job, data: Path, out: Path) -> Settings:
    """The settings of one run."""
    row = plan["rows"][job.row]
    chosen = plan["settings"] | {key: value for key, value in row.items() if key in KNOBS}
    if row.get("init") in plan["rows"]:
        chosen["init"] = str(out / Job(row["init"], job.seed, job.fold).name)
    fixed = {"seed": job.seed, "fold": job.fold, "precision": plan["precision"], "data": data, "out": out / job.name}
    return Settings(**chosen | fixed)


def results_path(results: Path, job: Job) -> Path:
    return results / f"{job.name}.npz"


def run_plan(path: Path, data: Path, out: Path, results: Path, max_minutes: float | None = None) -> dict:
    """Do what is left of a plan, then write and return its summary. Several processes may work on one plan.

    A finished run leaves results/<run>.npz; its folder under `out` is removed when no unfinished run starts from it.
    """
    plan, deadline = read_plan(path), time.monotonic() + 60 * (max_minutes or 1e9)
    read_results(plan, make_folder(results))  # refuses what is out of date before any training
    ended = False
    while not ended:
        ended = True
        for job in jobs_of(plan):
            left = (deadline - time.monotonic()) / 60
            if left <= 0 or not is_next(plan, job, out, results):
                continue
            try:
                with FileLock(make_folder(out) / f".{job.name}.lock", timeout=0):
                    if is_next(plan, job, out, results):
                        ended &= not do(plan, job, data, out, results, left if max_minutes else None)
            except Timeout:  # another process is at it
                continue
    return summarise(plan, results)


def children(plan: dict, job: Job) -> list[Job]:
    """The runs that start from this one."""
    return [replace(job, row=name) for name, row in plan["rows"].items() if row.get("init") == job.row]


def is_next(plan: dict, job: Job, out: Path, results: Path) -> bool:
    """Whether a run is still to be done, for its result or for the weights that another one starts from, and can be."""
    init = plan["rows"][job.row].get("init")
    if init in plan["rows"]:
        start = replace(job, row=init)
        if not (is_trained(out / start.name) and results_path(results, start).is_file()):
            return False
    needed = [child for child in children(plan, job) if not results_path(results, child).is_file()]
    return not results_path(results, job).is_file() or (bool(needed) and not is_trained(out / job.name))


def is_trained(run: Path) -> bool:
    """Whether a run folder has the weights of a finished training."""
    return (run / checkpoint.WEIGHTS).is_file() and not checkpoint.unfinished(checkpoint.read_about(run))


def do(plan: dict, job: Job, data: Path, out: Path, results: Path, max_minutes: float | None) -> bool:
    """Train and score one run; returns whether it was finished in time."""
    run = out / job.name
    history = train(replace(settings_of(plan, job, data, out), max_minutes=max_minutes), log=lambda row: None)
    config = checkpoint.read_config(run)
    if len(history) < config["cycles"][-1] or results_path(results, job).is_file():
        return len(history) == config["cycles"][-1]
    found = evaluate_run(run, data)
    details, classes = found["details"], found["rules"][found["trained_void"]]["classes"]
    facts = {"row": job.row, "seed": job.seed, "fold": job.fold, "start": start_of(plan, job, results)}
    facts["settings"] = {key: value for key, value in config["settings"].items() if key not in FREE}
    facts |= {key: config[key] for key in ("classes", "people")} | {key: found[key] for key in KEPT}
    facts |= {"scores": headline(found), "val_miou": [row["val_miou"] for row in history]}
    facts |= {key: {name: row[key] for name, row in classes.items()} for key in ("precision", "recall")}
    facts |= {key: value["mean"] for key, value in details.items() if key.startswith("boundary_")}
    facts |= {key: details[key] for key in ("iou_by_size", "calibration_error")}
    if job.fold is not None and (data / "stats_val.json").is_file():  # reported beside, and never chosen on
        facts["val"] = headline(evaluate_run(run, data, "val"))
    facts["lost_under_occluders"] = unseen_occluders(run, data, found["split"])
    facts["flipped"] = flipped_scores(run, load_split(data, found["split"]))
    confusions = read_confusions(run, found["split"])[1].astype(np.uint32)
    with atomic_open(results_path(results, job), durable=True) as file:
        np.savez_compressed(file, facts=json.dumps(facts), confusions=confusions)
    for other in jobs_of(plan):  # whose weights no run needs any more
        done = all(results_path(results, run).is_file() for run in (other, *children(plan, other)))
        if done and other.fold is not None:
            shutil.rmtree(out / other.name, ignore_errors=True)
    return True


def start_of(plan: dict, job: Job, results: Path) -> dict:
    """What a run starts from: how another row was trained, the hash of a file of weights, or nothing."""
    init = plan["rows"][job.row].get("init")
    if init not in plan["rows"]:
        return {"sha256": checkpoint.weights_sha256(Path(init))} if init else {}
    facts, _ = read_result(results_path(results, replace(job, row=init)))
    return {key: facts[key] for key in ("settings", "epochs", "start") if key in facts}


@torch.inference_mode()
def flipped_scores(run: Path, dataset: SegmentationSet) -> dict[str, float]:
    """mIoU, and IoU of people, of predictions that are means over an image and its mirror image."""
    (model, about), device, found = trained_model(run), pick_device(), []
    for images, masks, _ in Batches(dataset, 8, device).epoch():
        both = [forward(model, x, "fp32").softmax(dim=1) for x in (images, images.flip(-1))]
        found.append(confusion_matrices((both[0] + both[1].flip(-1)).argmax(dim=1), masks, len(about["classes"])))
    score = scores(torch.cat(found).sum(dim=0).cpu().numpy(), about["classes"], about["void"])
    return {"mIoU": score["miou"]} | {name: score["classes"][name]["iou"] for name in about["people"]}


def read_result(path: Path) -> tuple[dict, np.ndarray]:
    """Facts and matrices (N, C + 1, C) of a run. Raises UserError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file["facts"])), file["confusions"].astype(np.int64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected a result of a plan, found {error}; delete it and rerun") from None


def read_results(plan: dict, results: Path) -> dict[Job, tuple[dict, np.ndarray]]:
    """The results that are there. Raises UserError for one of other settings than the plan's, or of other data."""
    found, data = {}, {}
    for job in jobs_of(plan):
        path = results_path(results, job)
        if path.is_file():
            found[job] = facts, _ = read_result(path)
            other = changed(plan, job, facts)
            other += ["data"] * (facts["data_sha256"] != data.setdefault(job.fold, facts["data_sha256"]))
            if other:
                raise UserError(f"{path}: was made with other {', '.join(other)}; delete it, or take another --results")
    return found


def changed(plan: dict, job: Job, facts: dict) -> list[str]:
    """The settings in which a run differs from the plan, and "init" where what it started from does."""
    given = {key: value for key, value in vars(settings_of(plan, job, Path(), Path())).items() if value is not None}
    wanted, there = complete(given), complete(facts["settings"]) | {"epochs": facts["epochs"]}
    compared = there.keys() - (set(FREE) - {"epochs"}) - (INHERITED.keys() - given.keys())
    found = sorted(key for key in compared if there[key] != wanted[key])
    init, start = plan["rows"][job.row].get("init"), facts.get("start")  # older results have none
    if start and "settings" in start and init in plan["rows"]:
        return found + ["init"] * bool(changed(plan, replace(job, row=init), start))
    return found + ["init"] * (start is not None and (init in plan["rows"] or start != start_of(plan, job, Path())))


def summarise(plan: dict, results: Path) -> dict:
    """Mean and standard deviation over the seeds of each row's scores, themselves means over the folds, and verdicts
    against its control, and the control's means, over the seeds that both have; written to results/summary.json."""
    done = read_results(plan, results)
    found, rows = {}, {}
    for name, row in plan["rows"].items():
        seeds = [s for s in plan["seeds"] if all(Job(name, s, fold) in done for fold in plan["folds"])]
        found[name] = {seed: [done[Job(name, seed, fold)] for fold in plan["folds"]] for seed in seeds}
        rows[name] = {"title": row.get("title", name), "seeds": seeds, "runs": sum(job.row == name for job in done)}
        rows[name]["control"] = row.get("control")
        if seeds:
            rows[name] |= statistics(found[name])
    pairs = {}
    for name, row in plan["rows"].items():
        both = [seed for seed in found[name] if seed in found.get(row.get("control"), {})]
        if both:
            pairs[name] = [{seed: found[side][seed] for seed in both} for side in (row["control"], name)]
            rows[name]["control_mean"] = statistics(pairs[name][0])["mean"]
    people = next((facts["people"] for facts, _ in done.values()), [])
    for score, class_name in {"miou": None, **{f"{name}_iou": name for name in people}}.items():
        compared = {name: against(*pair, class_name) for name, pair in pairs.items()}
        for name, verdict in verdicts(compared).items():
            rows[name][f"{score}_against_control"] = verdict
    summary = {"name": plan["name"], "precision": plan["precision"], "folds": plan["folds"], "rows": rows}
    sessions = {"sessions": [facts | {"size": "x".join(map(str, facts["size"]))} for facts, _ in done.values()]}
    summary["context"] = {key: joined(sessions, key) for key in ("size", "device", "torch", "commit")}
    write_json(results / "summary.json", summary)
    return summary


def statistics(by_seed: dict[int, list]) -> dict:
    """Mean and sample standard deviation over the seeds of every number in the facts, first averaged over the folds."""
    table: dict[str, list] = {}
    for folds in by_seed.values():
        numbers = [flatten(facts) for facts, _ in folds]
        for key in numbers[0]:
            table.setdefault(key, []).append(mean([one.get(key) for one in numbers]))
    known = {key: [value for value in values if value is not None] for key, values in table.items()}
    found = {"mean": {key: float(np.mean(values)) for key, values in known.items() if values}}
    return found | {"std": {key: float(np.std(values, ddof=1)) for key, values in known.items() if len(values) > 1}}


def flatten(facts: dict) -> dict[str, float | None]:
    """The numbers of a run under one name each, such as "iou_by_size person small"."""
    numbers = {}
    for group in ("scores", "flipped", "val", "precision", "recall", "iou_by_size", "lost_under_occluders"):
        for name, value in facts.get(group, {}).items():
            more = value if isinstance(value, dict) else {"": value}
            numbers |= {f"{group} {name} {key}".strip(): number for key, number in more.items()}
    return numbers | {key: facts[key] for key in facts if key.startswith(("boundary_", "calibration_error"))}


def against(base: dict[int, list], other: dict[int, list], class_name: str | None) -> dict:
    """`difference` of two rows over the images of all folds: of mIoU, or of the IoU of a class."""
    facts = [facts for facts, _ in next(iter(base.values()))]
    stems = [image.partition("/")[2] for fold in facts for image in fold["images"]]
    groups = [np.stack([np.concatenate([c for _, c in folds]) for folds in row.values()]) for row in (base, other)]
    score = pooled_miou
    if class_name is not None:
        place = facts[0]["classes"].index(class_name)
        score = lambda confusions, void: iou(under_rule(confusions, void))[..., place]  # noqa: E731
    blocks, timed = time_blocks(stems)
    found = difference(*groups, blocks, facts[0]["trained_void"], score)
    found |= {"score": f"IoU of {class_name}" if class_name else "mIoU", "images": len(stems)}
    return found | {"split": ", ".join(fact["split"] for fact in facts), "names_tell_time": timed}


def plan_table(summary: dict) -> str:
    """The summary as text."""
    lines = [f"{'':<44}{'runs':>5}{'mIoU':>18}{'person':>18}"]
    for row in summary["rows"].values():
        keys = [key for key in ("scores mIoU", "scores person") if key in row.get("mean", {})]
        cells = [f"{row['mean'][key]:.4f}" + (f" ± {row['std'][key]:.4f}" if key in row["std"] else "") for key in keys]
        lines.append(f"{row['title'][:43]:<44}{row['runs']:>5}" + "".join(f"{cell:>18}" for cell in cells))
        found = [row[key] for key in row if key.endswith("_against_control")]
        lines += [verdict_line(f"    against {row['control']}", verdict) for verdict in found]
    return "\n".join(lines)
