"""What a run folder holds: weights, settings, history, training state. Nothing loaded here can run code."""

import csv
import io
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .files import atomic_open

WEIGHTS, CONFIG, HISTORY, STATE = "model.safetensors", "config.json", "history.csv", "state.pt"
METADATA = ("stage", "class_set", "channels", "depth", "width", "height", "void", "seed", "commit")


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a model's state with its metadata (all text) as safetensors."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with atomic_open(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


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
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a safetensors file, found {error}") from None
    missing = set(METADATA) - metadata.keys()
    if missing:
        raise ValueError(f"{path}: expected weights saved by unetseg, found none of the metadata {sorted(missing)}")
    return state, metadata


def save_state(path: Path, state: dict) -> None:
    """Write the training state: tensors, numbers, text, lists and dicts."""
    with atomic_open(path) as file:
        torch.save(state, file)


def load_state(path: Path) -> dict | None:
    """The training state, or None where there is none yet. Raises ValueError naming a file that is damaged."""
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no common base for what a damaged file raises
        raise ValueError(
            f"{path}: expected a training state, found {type(error).__name__}; delete it to start anew"
        ) from None


def write_history(run: Path, history: list[dict]) -> None:
    """Write one line per epoch as CSV into a run folder."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with atomic_open(run / HISTORY) as file:
        file.write(text.getvalue().encode())


def read_history(run: Path) -> list[dict[str, float]]:
    """The history of a run folder, one dict per epoch; empty where no epoch was finished."""
    if not (run / HISTORY).is_file():
        return []
    with open(run / HISTORY, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
