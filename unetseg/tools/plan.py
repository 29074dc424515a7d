"""A plan: rows of settings x seeds x folds, each trained, scored into one small file, and summed up in one table.

It is TOML: `name`, `precision`, `seeds`, `folds` (without them a run trains on the whole of train), what all rows
share under [settings], and a table [rows.<name>] each: `title`, settings, and as `control` the row to compare it with.
`init` is a file of weights, or an earlier row, whose run of the same seed and fold a run starts from.
"""

import json
import math
import re
import time
import tomllib
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import checkpoint
from ..data import load_split
from ..evaluation import evaluate_run, headline, joined, verdicts
from ..evaluation.compare import difference_over, pooled_miou, read_arrays, read_confusions, verdict_line
from ..evaluation.details import mean
from ..evaluation.robustness import counts, predict_all, unseen_occluders
from ..files import Busy, UserError, atomic_open, exclusive, make_folder, read_bytes, write_json
from ..inference import trained_model
from ..metrics import iou, scores, under_rule
from ..processed import find_split, scored_split, training_splits
from ..run import train
from ..settings import FREE, INHERITED, KNOBS, Settings, complete, with_preset

ALL = {"name", "precision", "seeds", "folds", "settings", "rows"}
ROW = {"title", "control", *KNOBS} - {"precision", "seed", "fold", "data", "out", "max_minutes"}
NO_MATTER = {*FREE} - {"init", "epochs"}  # settings that decide no number
KEPT = ("split", "size", "trained_void", "device", "torch", "commit", "epochs", "train_seconds", "parameters", "images")


@dataclass(frozen=True)
class Job:
    """One run of a plan: a row under a seed, which holds out a fold (None: trained on all of train)."""

    row: str
    seed: int
    fold: int | None

    @property
    def name(self) -> str:
        return f"{self.row}-seed{self.seed}" + (f"-fold{self.fold}" if self.fold is not None else "")


def read_plan(path: Path) -> dict:
    """The plan in a TOML file. Raises UserError for names that are unknown, and for values that no setting takes."""
    content = read_bytes(path)
    try:
        plan = {"folds": [None], "settings": {}, **tomllib.loads(content.decode())}
        unknown = [*({*plan} - ALL), *({*plan["settings"]} - (ROW - {"title", "control"}))]
        unknown += [f"{name}.{key}" for name, row in plan["rows"].items() for key in {*row} - (ROW - {"void"})]
        rows = plan["rows"] = {name: plan["settings"] | row for name, row in plan["rows"].items()}
        jobs = jobs_of(plan)
        twice = len({*jobs}) < len(jobs) or len({row.get("title", name) for name, row in rows.items()}) < len(rows)
        if unknown or not (plan["name"] and jobs) or twice or plan["precision"] == "auto":
            said = "no rows, seeds or folds, one of them (or a title) twice, or precision auto"
            raise ValueError(f"the unknown {', '.join(unknown)}" if unknown else said)
        for place, (name, row) in enumerate(rows.items()):
            init, control = row.get("init"), row.get("control")
            if init and init not in list(rows)[:place] and (init in rows or not Path(init).is_file()):
                raise ValueError(f"{name}.init, which names neither an earlier row nor a file: {init!r}")
            if control and control not in {*rows} - {name}:
                raise ValueError(f"{name}.control, which names no other row: {control!r}")
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"the row {name!r}, whose name can be no file's")
        for job in jobs:
            with_preset(settings_of(plan, job, Path(), Path()))
        if len({recipe_of(plan, job)["void"] for job in jobs}) > 1:
            raise ValueError("rows that start from weights of two void rules; give one under [settings]")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: expected a plan as docs/plans.md describes it, found {found}") from None
    return plan


def jobs_of(plan: dict) -> list[Job]:
    """Every run, whole rows first seed by seed, so that an early end leaves rows that can be compared."""
    return [Job(row, seed, fold) for seed in plan["seeds"] for row in plan["rows"] for fold in plan["folds"]]


def start_of(plan: dict, job: Job) -> Job | None:
    """The run that a run starts from, where it is one of the plan."""
    init = plan["rows"][job.row].get("init")
    return replace(job, row=init) if init in plan["rows"] else None


def settings_of(plan: dict, job: Job, data: Path, out: Path) -> Settings:
    """The settings of one run."""
    chosen = {key: value for key, value in plan["rows"][job.row].items() if key in KNOBS}
    if start := start_of(plan, job):
        chosen["init"] = str(out / start.name)
    fixed = {"seed": job.seed, "fold": job.fold, "precision": plan["precision"], "data": data, "out": out / job.name}
    return Settings(**chosen | fixed)


def recipe_of(plan: dict, job: Job) -> dict:
    """All that decides a run's numbers besides its data: its settings, and as `init` the recipe of the run that it
    starts from, or the hash of a file of weights."""
    given = {key: value for key, value in vars(settings_of(plan, job, Path(), Path())).items() if value is not None}
    known, init = {}, given.get("init")
    if start := start_of(plan, job):
        known = given["init"] = recipe_of(plan, start)
    elif init:
        known, given["init"] = checkpoint.read_about(Path(init)), checkpoint.weights_sha256(Path(init))
    if other := [n for n in INHERITED if n != "void" and known and given.get(n, known[n]) != known[n]]:
        raise ValueError(f"{job.row}.{other[0]}, which is not that of the network it starts from")
    return whole({name: known[name] for name in INHERITED if known} | given)


def whole(recipe: dict) -> dict:
    """A recipe with the defaults of those settings that were not known when it was stored."""
    init, found = recipe.get("init"), complete(recipe)
    found["init"] = whole(init) if isinstance(init, dict) else init
    return {key: value for key, value in found.items() if key not in NO_MATTER}


def data_of(data: Path, fold: int | None) -> dict[str, str]:
    """Fingerprints of what a run is trained and scored on."""
    names = {"trained": training_splits(fold)[0], "scored": scored_split(data, fold)}
    names |= {"val": "val"} if fold is not None and (data / "stats_val.json").is_file() else {}
    return {use: find_split(data, name).sha256 for use, name in names.items()}


def run_plan(path: Path, data: Path, out: Path, results: Path, max_minutes: float = math.inf) -> dict:
    """Do what is left of a plan, then write and return its summary. Several processes may work on one plan: what one is
    at, the others leave for later."""
    plan, end = read_plan(path), time.monotonic() + 60 * max_minutes
    read_results(plan, make_folder(results), {fold: data_of(data, fold) for fold in plan["folds"]})
    left = jobs_of(plan)
    while left and time.monotonic() < end:
        job = left.pop(0)
        try:
            with exclusive(out / ".locks" / job.name):
                path = results / f"{job.name}.npz"
                if not path.is_file():
                    if not trained(plan, job, data, out, end):
                        break
                    score(out / job.name, data, job.fold, recipe_of(plan, job), path)
        except Busy:
            left.append(job)
            time.sleep(1)
    return summarise(plan, results)


def trained(plan: dict, job: Job, data: Path, out: Path, end: float) -> bool:
    """Train a run, after the one that it starts from; False where the time `end` (time.monotonic) came first. Raises
    Busy where another process trains its start, UserError where the folder's run was planned for other epochs, or
    its start has other weights by now."""
    if start := start_of(plan, job):
        with nullcontext() if is_trained(out / start.name) else exclusive(out / ".locks" / start.name):
            if not trained(plan, start, data, out, end):
                return False
    settings, left = settings_of(plan, job, data, out), max(1e-3, (end - time.monotonic()) / 60)
    run, init = Path(settings.out), settings.init
    if any((run / name).is_file() for name in (checkpoint.WEIGHTS, checkpoint.STATE)):
        config, now = checkpoint.read_config(run), checkpoint.weights_sha256(Path(init)) if init else None
        if config["cycles"] != [with_preset(settings).epochs] or now != config["init_sha256"]:
            raise UserError(f"{run}: expected the training that the plan describes; delete the folder")
    train(replace(settings, max_minutes=None if end == math.inf else left), log=lambda row: None)
    if done := is_trained(run):
        (run / checkpoint.STATE).unlink(missing_ok=True)
    return done


def is_trained(run: Path) -> bool:
    """Whether a run folder has the weights of a finished training."""
    return (run / checkpoint.WEIGHTS).is_file() and not checkpoint.unfinished(checkpoint.read_about(run))


def score(run: Path, data: Path, fold: int | None, recipe: dict, path: Path) -> None:
    """Score a trained run, and write its result: facts, and the matrix of each image."""
    found = evaluate_run(run, data)
    details, classes = found["details"], found["rules"][found["trained_void"]]["classes"]
    (model, about), dataset = trained_model(run), load_split(data, found["split"])
    facts = {key: about[key] for key in ("classes", "people")} | {key: found[key] for key in KEPT}
    facts |= {"recipe": recipe, "data": data_of(data, fold), "scores": headline(found)}
    facts["notes"] = [found["split_note"], *found["remarks"]]
    facts["val_miou"] = [row["val_miou"] for row in checkpoint.read_history(run)]
    facts |= {key: {name: row[key] for name, row in classes.items()} for key in ("precision", "recall")}
    facts |= {key: value["mean"] for key, value in details.items() if key.startswith("boundary_")}
    facts |= {key: details[key] for key in ("iou_by_size", "calibration_error")}
    if fold is not None and (data / "stats_val.json").is_file():  # reported beside, and never chosen on
        facts["val"] = headline(evaluate_run(run, data, "val"))
    facts["lost_under_occluders"] = unseen_occluders(model, about, dataset)
    images, masks = (array.cpu().numpy() for array in (dataset.images, dataset.masks))
    flipped = counts(predict_all(model, images, flip=True), masks, len(dataset.class_set)).sum(axis=0)
    flipped = scores(flipped, about["classes"], about["void"])
    facts["flipped"] = {"mIoU": flipped["miou"]} | {name: flipped["classes"][name]["iou"] for name in about["people"]}
    with atomic_open(path, durable=True) as file:
        confusions = read_confusions(run, found["split"])[1].astype(np.uint32)
        np.savez_compressed(file, facts=json.dumps(facts), confusions=confusions)


def read_results(plan: dict, results: Path, data: dict | None = None) -> dict[Job, tuple[dict, np.ndarray]]:
    """The results that are there, as facts and matrices (N, C + 1, C). Raises UserError for one that is damaged, made
    by another recipe than the plan's, or of other data than its fold in `data` (without it: than the first one's)."""
    found, data = {}, {**(data or {})}
    for job in jobs_of(plan):
        path = results / f"{job.name}.npz"
        if path.is_file():
            confusions, text = read_arrays(path, "facts", "delete it and rerun")
            facts = json.loads(text)
            if not {"recipe", "data"} <= facts.keys():
                raise UserError(f"{path}: was written by another version of unetseg; delete it and rerun")
            there, wanted = whole(facts["recipe"]), recipe_of(plan, job)
            other = sorted(key for key in wanted if wanted[key] != there[key])
            made_with = data.setdefault(job.fold, facts["data"])
            other += ["data"] * any(facts["data"].get(use, sha256) != sha256 for use, sha256 in made_with.items())
            if other:
                raise UserError(f"{path}: was made with other {', '.join(other)}; delete it and the run's folder")
            found[job] = facts, confusions
    return found


def summarise(plan: dict, results: Path) -> dict:
    """Mean and standard deviation over the seeds of each row's scores, themselves means over the folds, and verdicts
    against its control, and the control's means, over the seeds that both have; written to results/summary.json."""
    done = read_results(plan, results)
    found, rows, pairs = {}, {}, {}
    for name, row in plan["rows"].items():
        runs = {seed: [done.get(Job(name, seed, fold)) for fold in plan["folds"]] for seed in plan["seeds"]}
        found[name] = {seed: folds for seed, folds in runs.items() if None not in folds}
        rows[name] = {"title": str(row.get("title", name)), "seeds": [*found[name]], "control": row.get("control")}
        rows[name] |= {"runs": sum(job.row == name for job in done)} | (statistics(found[name]) if found[name] else {})
    for name, row in rows.items():
        if both := [seed for seed in row["seeds"] if seed in found.get(row["control"], {})]:
            pairs[name] = [{seed: found[side][seed] for seed in both} for side in (row["control"], name)]
            row["control_mean"] = statistics(pairs[name][0])["mean"]
    people = next((facts["people"] for facts, _ in done.values()), [])
    for key, class_name in {"miou": None, **{f"{name}_iou": name for name in people}}.items():
        scored = [name for name in pairs if f"scores {class_name or 'mIoU'}" in rows[name]["mean"]]
        for name, verdict in verdicts({name: difference_of_rows(*pairs[name], class_name) for name in scored}).items():
            rows[name][f"{key}_against_control"] = verdict
    summary = {key: plan[key] for key in ("name", "precision", "folds")} | {"people": people, "rows": rows}
    sessions = [facts | {"size": "x".join(map(str, facts["size"]))} for facts, _ in done.values()]
    summary["notes"] = [*dict.fromkeys(note for facts, _ in done.values() for note in facts.get("notes", []))]
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
    numbers["lost under occluders"] = mean([*facts["lost_under_occluders"].values()])
    return numbers | {key: facts[key] for key in facts if key.startswith(("boundary_", "calibration_error"))}


def difference_of_rows(base: dict[int, list], other: dict[int, list], class_name: str | None) -> dict:
    """The difference of two rows over the images of all folds, paired by seed: of mIoU, or of the IoU of a class. A
    single seed gets no verdict: what another one would change is unknown."""
    facts = [facts for facts, _ in next(iter(base.values()))]
    scored = facts[0] | {"split": ", ".join(fold["split"] for fold in facts)}
    scored["images"] = [image for fold in facts for image in fold["images"]]
    groups = [np.stack([np.concatenate([c for _, c in folds]) for folds in row.values()]) for row in (base, other)]
    of_class = lambda counts, void: iou(under_rule(counts, void))[..., facts[0]["classes"].index(class_name)]  # noqa: E731
    found = difference_over(*groups, scored, score=of_class if class_name else pooled_miou, paired=True)
    found["score"] = f"IoU of {class_name}" if class_name else "mIoU"
    return {key: value for key, value in found.items() if key != "p" or len(base) > 1}


def plan_table(summary: dict) -> str:
    """The summary as text."""
    lines = [f"{'':<44}{'runs':>5}" + "".join(f"{name:>18}" for name in ("mIoU", *summary["people"]))]
    for row in summary["rows"].values():
        keys = [key for name in ("mIoU", *summary["people"]) if (key := f"scores {name}") in row.get("mean", {})]
        cells = [f"{row['mean'][key]:.4f}" + (f" ± {row['std'][key]:.4f}" if key in row["std"] else "") for key in keys]
        lines.append(f"{row['title'][:43]:<44}{row['runs']:>5}" + "".join(f"{cell:>18}" for cell in cells))
        start = f"    against {row['control']}"
        lines += [verdict_line(start, row[key]) for key in row if key.endswith("_against_control")]
    return "\n".join(lines + summary["notes"])
