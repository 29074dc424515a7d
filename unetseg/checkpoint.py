"""What a run folder holds: settings, weights, history and training state. Nothing loaded here can run code."""

import csv
import hashlib
import io
import json
import reprlib
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from .device import out_of_memory
from .files import UserError, read_bytes, read_json, write_bytes
from .model import build_model
from .settings import FREE, INHERITED, Settings, check, complete

WEIGHTS, CONFIG, HISTORY, STATE = "model.safetensors", "config.json", "history.csv", "state.pt"
FORMAT = 3  # of config.json, state and weights; weights of format 2 are still read


def identity(config: dict) -> dict:
    """What makes a run this run and no other: settings, data and initial weights; the same when it resumes."""
    facts = {name: value for name, value in complete(config["settings"]).items() if name not in FREE}
    facts |= {f"{split}_sha256": config["data"][split]["sha256"] for split in ("train", "val")}
    return facts | {key: config[key] for key in ("class_set", "classes", "width", "height", "init_sha256")}


def differences(there: dict, here: dict) -> list[str]:
    """The facts of `here` that are others there, a line each."""
    changed = [key for key in here if there.get(key) != here[key]]
    return [f"  {key}: {reprlib.repr(there.get(key))} there, {reprlib.repr(here[key])} here" for key in changed]


def save_weights(run: Path, weights: dict, progress: dict, config: dict) -> None:
    """Write weights as safetensors; all metadata is one JSON text: the same run gives the same bytes.

    progress  epoch (finished ones), step (of the one begun), val_miou (None before the first epoch's end)
    """
    about = {key: config.get(key) for key in ("colours", "people", "cycles", "starts")}
    about |= {"format": FORMAT, **identity(config)}
    tensors = {key: value.to("cpu").contiguous() for key, value in weights.items()}
    content = safetensors.torch.save(tensors, {"unetseg": json.dumps(about | progress, sort_keys=True)})
    write_bytes(run / WEIGHTS, content, durable=True)


def weights_path(run_or_weights: Path) -> Path:
    """The weights file of a run folder, or the file itself. Raises UserError when there is none."""
    path = run_or_weights / WEIGHTS if run_or_weights.is_dir() else run_or_weights
    if not path.is_file():
        raise UserError(f"{path}: expected trained weights, found nothing; train first, or check the path")
    return path


def weights_sha256(run_or_weights: Path) -> str:
    """SHA-256 of a weights file."""
    with open(weights_path(run_or_weights), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_about(run_or_weights: Path) -> dict:
    """What weights were trained with: their run's `identity`, and how far (`save_weights`). Raises UserError for a
    damaged file, and for weights that lie in the folder of another run."""
    path = weights_path(run_or_weights)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["unetseg"])
        about = complete(about) | about
        check(Settings(**{name: about[name] for name in INHERITED}))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(f"{path}: expected weights saved by unetseg, found {found}; copy the file again") from None
    if path.parent == run_or_weights and (run_or_weights / CONFIG).is_file() and about["format"] == FORMAT:
        config = read_config(run_or_weights)
        cycles = config["cycles"][: len(about["cycles"])]  # a run may have been given more epochs since
        if changed := differences(about, identity(config) | {"cycles": cycles}):
            raise UserError("\n".join([f"{path}: these weights are from another run than {CONFIG}:", *changed]))
    return about


def unfinished(about: dict) -> str:
    """How far training had come when these weights were saved, in words; "" when it was done."""
    planned = about["cycles"][-1] if about["format"] == FORMAT else 0
    return f"{about['epoch']} of {planned} epochs" if about["epoch"] < planned else ""


def load_model(run_or_weights: Path) -> tuple[nn.Module, dict]:
    """The trained network on the CPU, and what it was trained with, as `read_about`. Raises UserError."""
    about, path = read_about(run_or_weights), weights_path(run_or_weights)
    model = build_model(about, len(about["classes"]))
    try:
        weights = safetensors.torch.load_file(path)
        model.load_state_dict(weights)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: expected weights of {about['model']!r}, found {str(error)[:300]}") from None
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{path}: expected finite weights, found NaN or infinity; train again with a lower lr")
    return model, about


def save_state(run: Path, state: dict, config: dict) -> None:
    """Write the training state: tensors, numbers, texts, lists and dicts. The last one stays until this is complete."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: the run folder was removed during training; nothing more is saved")
    content = io.BytesIO()  # torch.save itself hides why it could not write
    torch.save(state | {"format": FORMAT, "identity": identity(config)}, content)
    write_bytes(run / STATE, content.getbuffer(), durable=True)


def load_state(run: Path, config: dict) -> dict | None:
    """The training state, or None where there is none. Raises UserError when it is damaged or another run's."""
    path = run / STATE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise KeyError("another format")
    except Exception as error:  # torch has no common base class for the errors of damaged files
        if out_of_memory(error):
            raise
        found = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
        advice = "start another run from its weights with --init, or delete the file to start anew"
        raise UserError(f"{path}: expected a training state of this version, found {found}; {advice}") from None
    if changed := differences(complete(state["identity"]) | state["identity"], identity(config)):
        raise UserError("\n".join([f"{path}: this state is from another run than {CONFIG}:", *changed]))
    return state


def read_config(run: Path) -> dict:
    """config.json of a run folder. Raises UserError when it is missing, damaged or of another version."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"{path}: expected the settings of a run, found nothing; is {run} a run folder?")
    config = read_json(path)
    if config.get("format") != FORMAT:
        advice = "its weights still predict and start fine-tunings (--init), but it cannot resume"
        raise UserError(f"{run}: this run is from another version of unetseg; {advice}; use another --out")
    try:
        identity(config)
        return config
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: expected the settings of a run, found no {error}; restore the file") from None


def write_history(run: Path, history: list[dict]) -> None:
    """Write one line per epoch as CSV; where an epoch's version of unetseg had no such column, it has no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in history for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_bytes(run / HISTORY, text.getvalue().encode(), durable=True)


def read_history(run: Path) -> list[dict]:
    """The history, one dict of numbers (None: no value) per finished epoch. Raises UserError."""
    path = run / HISTORY
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path).decode()))) if path.is_file() else []
        history = [{key: float(value) if value else None for key, value in row.items()} for row in rows]
        if [row["epoch"] for row in history] != [*range(1, len(rows) + 1)]:
            raise ValueError("epochs that are not 1, 2, 3 ...")
        return history
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: expected one line of numbers per epoch, found {error}; restore the file") from None
