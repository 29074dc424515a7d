"""What a run folder holds: weights, settings, history, training state. Nothing loaded here can run code."""

import csv
import hashlib
import io
import json
import reprlib
import zipfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .classes import CLASS_SETS, VOID_RULES
from .files import atomic_open, read_bytes, read_json
from .model import MOST, UNet

WEIGHTS, CONFIG, HISTORY, STATE = "model.safetensors", "config.json", "history.csv", "state.pt"
COLUMNS = ("epoch", "train_loss", "val_loss", "val_miou", "lr", "seconds", "images_per_second")  # of the history
METADATA = ("stage", "class_set", "channels", "depth", "width", "height", "void", "seed", "precision", "parameters")
METADATA += ("device", "torch", "commit")
KNOWN = {key: {str(n) for n in range(1, most + 1)} for key, most in {**MOST, "width": 8192, "height": 8192}.items()}
KNOWN |= {"class_set": CLASS_SETS, "void": VOID_RULES}


def save_weights(run: Path, state: dict[str, Tensor], config: dict, epoch: int, val_miou: float) -> None:
    """Write a model's state as safetensors, with the METADATA of its run, its epoch and val mIoU, and a checksum."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    metadata = {key: str(config[key]) for key in METADATA}
    metadata |= {"epoch": str(epoch), "val_miou": f"{val_miou:.6f}", "sha256": checksum(tensors)}
    content = safetensors.torch.save(tensors, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))  # safetensors itself writes them in any order
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_open(run / WEIGHTS, durable=True) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(content)[end:])


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and contents."""
    sum_ = hashlib.sha256()
    for key in sorted(tensors):
        sum_.update(key.encode())
        sum_.update(tensors[key].reshape(-1).view(torch.uint8).numpy())
    return sum_.hexdigest()


def weights_path(run_or_weights: Path) -> Path:
    """The weights file of a run folder, or the file itself. Raises ValueError when there is none."""
    path = run_or_weights / WEIGHTS if run_or_weights.is_dir() else run_or_weights
    if not path.is_file():
        raise ValueError(f"{path}: expected trained weights, found nothing; train first, or check the path")
    return path


def load_weights(run_or_weights: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A run folder's or a file's weights and their metadata. Raises ValueError naming a file that holds others."""
    path = weights_path(run_or_weights)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            _check_network({key: file.get_slice(key).get_shape() for key in keys}, metadata)
            state = {key: file.get_tensor(key) for key in keys}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected weights saved by unetseg, found {error}") from None
    if checksum(state) != metadata["sha256"]:
        raise ValueError(f"{path}: expected the weights that were saved, found others (wrong checksum); copy it anew")
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path}: expected finite weights, found NaN or infinity; train anew")
    return state, metadata


def _check_network(shapes: dict[str, list[int]], metadata: dict[str, str]) -> None:
    """Raise ValueError unless the tensors are those of the U-Net that the metadata describe; nothing is read for it."""
    missing = sorted({*METADATA, "epoch", "sha256"} - metadata.keys())
    if missing:
        raise ValueError(f"none of the metadata {missing}")
    wrong = [f"{key} {metadata[key][:50]}" for key, known in KNOWN.items() if metadata[key] not in known]
    if wrong or not metadata["epoch"].isdecimal():
        raise ValueError(f"a network that it does not train: {', '.join(wrong) or 'no number of epochs'}")
    with torch.device("meta"):  # costs no memory, whatever the file declares
        model = UNet(len(CLASS_SETS[metadata["class_set"]]), int(metadata["channels"]), int(metadata["depth"]))
    expected = {key: list(value.shape) for key, value in model.state_dict().items()}
    for key in sorted(expected.keys() | shapes.keys()):
        if expected.get(key) != shapes.get(key):
            raise ValueError(f"{key[:50]} of shape {shapes.get(key)} where its metadata mean {expected.get(key)}")


def save_state(run: Path, state: dict) -> None:
    """Write the training state: tensors, numbers, text, lists and dicts. The one before stays until it is complete."""
    content = io.BytesIO()  # torch.save itself hides why it could not write
    torch.save(state, content)
    with atomic_open(run / STATE, durable=True) as file:
        file.write(content.getbuffer())


def load_state(run: Path) -> dict | None:
    """The training state, or None where there is none yet. Raises ValueError naming a file that is damaged."""
    path = run / STATE
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("compressed content")
            if archive.testzip():
                raise zipfile.BadZipFile("a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(state[key], dict) for key in ("config", "trainer", "position")):
            raise TypeError("no training state")
        check_history(state["position"]["history"])
        return state
    except Exception as error:  # torch names no common base for what a damaged file raises
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
        raise ValueError(f"{path}: expected a whole training state, found {reason}; delete it to start anew") from None


def read_config(run: Path) -> dict:
    """config.json of a run folder. Raises ValueError, naming it, when it is damaged or its weights tell otherwise."""
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(f"{path}: expected the settings of a run, found nothing; is {run} a run folder?")
    config = read_json(path)
    missing = sorted({*METADATA, "settings"} - config.keys())
    if missing or not isinstance(config["settings"], dict):
        raise ValueError(f"{path}: expected the settings of a run, found no {missing or 'settings'}; restore it")
    if type(config["settings"].get("epochs")) is not int:
        raise ValueError(f"{path}: expected a whole number of epochs in settings; restore it")
    if (run / WEIGHTS).is_file():
        metadata = load_weights(run)[1]
        wrong = [key for key in METADATA if str(config[key]) != metadata[key]]
        wrong = [f"{key} {reprlib.repr(config[key])}, not {metadata[key][:50]}" for key in wrong]
        if wrong:
            raise ValueError(f"{path}: expected what {WEIGHTS} was trained with, found {'; '.join(wrong)}; restore it")
    return config


def write_history(run: Path, history: list[dict]) -> None:
    """Write one line per epoch as CSV into a run folder."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with atomic_open(run / HISTORY, durable=True) as file:
        file.write(text.getvalue().encode())


def read_history(run: Path) -> list[dict[str, float]]:
    """The history of a run folder, one dict per epoch; empty where no epoch was finished.

    Raises ValueError naming a file that holds anything but numbers.
    """
    path = run / HISTORY
    if not path.is_file():
        return []
    try:
        rows = csv.DictReader(io.StringIO(read_bytes(path).decode()), strict=True)
        return check_history([{key: float(value) for key, value in row.items()} for row in rows])
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: expected one line of numbers per epoch, found {error}; restore it") from None


def check_history(rows: list[dict]) -> list[dict]:
    """The rows, if they are a history: a number in each of COLUMNS, epochs from 1 on. Raises ValueError if not."""
    for place, row in enumerate(rows, start=1):
        sound = row.keys() == set(COLUMNS) and all(isinstance(value, (int, float)) for value in row.values())
        if not (sound and row["epoch"] == place and 0 <= row["val_miou"] <= 1):
            raise ValueError(f"line {place} {reprlib.repr(row)}")
    return rows
