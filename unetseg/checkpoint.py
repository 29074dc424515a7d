"""What a run folder holds: settings, weights, history and training state. Nothing loaded here can run code."""

import csv
import hashlib
import io
import json
import pickle
import reprlib
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .classes import CLASS_SETS
from .device import out_of_memory
from .files import UserError, atomic_open, read_bytes, read_json
from .model import build_model
from .settings import FREE, INHERITED, Settings, check, complete

WEIGHTS, CONFIG, HISTORY, STATE = "model.safetensors", "config.json", "history.csv", "state.pt"
FORMAT = 2  # of config.json and the weights' metadata


def identity(config: dict) -> dict:
    """What makes a run this run and no other: settings, data and initial weights, by content; the same when it resumes."""
    facts = {name: value for name, value in complete(config["settings"]).items() if name not in FREE}
    facts |= {key: config[key] for key in ("class_set", "classes", "width", "height")}
    facts |= {f"{split}_sha256": config["data"][split]["sha256"] for split in ("train", "val")}
    return facts | {"init_sha256": config["init_sha256"]}


def differences(then: dict, now: dict) -> list[str]:
    """The facts that two identities do not share, a line each."""
    return [
        f"  {key}: {reprlib.repr(then.get(key))} there, {reprlib.repr(now[key])} here"
        for key in now
        if then.get(key) != now[key]
    ]


def save_weights(run: Path, best: dict, config: dict) -> None:
    """Write the best weights as safetensors; all metadata is one JSON text, so that a run always gives the same bytes."""
    about = {"format": FORMAT, **identity(config), "cycles": config["cycles"]}
    about |= {key: best[key] for key in ("epoch", "val_miou")}
    tensors = {key: value.contiguous() for key, value in best["weights"].items()}
    with atomic_open(run / WEIGHTS, durable=True) as file:
        file.write(safetensors.torch.save(tensors, {"unetseg": json.dumps(about, sort_keys=True)}))


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


def load_weights(run_or_weights: Path) -> tuple[dict[str, Tensor], dict]:
    """Weights, and what they were trained with: `identity`, cycles, epoch, val_miou.

    Raises UserError for a damaged file, and for weights in the folder of another run.
    """
    path = weights_path(run_or_weights)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = _read_metadata(file.metadata() or {})
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(f"{path}: expected weights saved by unetseg, found {reason}; copy the file again") from None
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{path}: expected finite weights, found NaN or infinity; train again with a lower lr")
    if path.parent == run_or_weights and about["format"] == FORMAT:
        config = read_config(run_or_weights)
        if changed := differences(about, identity(config)):
            raise UserError("\n".join([f"{path}: these weights are from another run than {CONFIG}:", *changed]))
    return weights, about


def _read_metadata(texts: dict[str, str]) -> dict:
    """What weights were trained with. Files written before FORMAT 2 have one text per fact."""
    about = json.loads(texts["unetseg"]) if "unetseg" in texts else {"format": 1, **texts}
    if about["format"] == 1:
        about |= {key: int(about[key]) for key in ("channels", "depth", "width", "height", "seed", "epoch")}
        about |= {"model": "unet", "classes": list(CLASS_SETS[about["class_set"]].names)}
        about["val_miou"] = float(about["val_miou"])
    about = {name: value for name, value in complete(about).items() if name not in FREE} | about
    check(Settings(**{name: about[name] for name in INHERITED}))
    if not (8 <= about["width"] <= 8192 and 8 <= about["height"] <= 8192 and about["class_set"] in CLASS_SETS):
        raise ValueError(f"size {about['width']}x{about['height']}, class set {about['class_set']}")
    return about


def load_model(run_or_weights: Path) -> tuple[nn.Module, dict]:
    """The trained network on the CPU, and what it was trained with. Raises UserError."""
    weights, about = load_weights(run_or_weights)
    try:
        model = build_model(about, len(about["classes"]))
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error)[:300]
        raise UserError(f"{run_or_weights}: the weights do not fit the network {about['model']!r}: {reason}") from None
    return model, about


def save_state(run: Path, state: dict) -> None:
    """Write the training state: tensors, numbers, text, lists and dicts. The last one stays until this is complete."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: the run folder was removed during training; nothing more is saved")
    content = io.BytesIO()  # torch.save hides why it could not write
    torch.save(state, content)
    with atomic_open(run / STATE, durable=True) as file:
        file.write(content.getbuffer())


def load_state(run: Path) -> dict | None:
    """The training state, or None where there is none. Raises UserError for a file that is damaged."""
    path = run / STATE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise KeyError("another format")
    except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError, OSError, ValueError) as error:
        if out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
        advice = "start another run from the best weights with --init, or delete the file to start anew"
        raise UserError(f"{path}: expected a training state of this version, found {reason}; {advice}") from None
    return state


def read_config(run: Path) -> dict:
    """config.json of a run folder. Raises UserError when it is missing, damaged or of an older version."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"{path}: expected the settings of a run, found nothing; is {run} a run folder?")
    config = read_json(path)
    if config.get("format") != FORMAT:
        advice = "its weights still predict and start fine-tunings (--init), but it cannot resume"
        raise UserError(f"{run}: this run is from another version of unetseg; {advice}; use another --out")
    try:
        identity(config)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: expected the settings of a run, found no {error}; restore the file") from None
    return config


def write_history(run: Path, history: list[dict]) -> None:
    """Write one line per epoch as CSV; an epoch has no value where its version of unetseg had no such column."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in history for key in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with atomic_open(run / HISTORY, durable=True) as file:
        file.write(text.getvalue().encode())


def read_history(run: Path) -> list[dict]:
    """The history of a run folder, one dict of numbers (None: no value) per epoch; empty where no epoch was finished."""
    path = run / HISTORY
    if not path.is_file():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path).decode()), strict=True))
        history = [{key: float(value) if value else None for key, value in row.items()} for row in rows]
        if [row["epoch"] for row in history] != [*range(1, len(rows) + 1)]:
            raise ValueError("epochs that are not 1, 2, 3 ...")
        return history
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: expected one line of numbers per epoch, found {error}; restore the file") from None
