"""Weights & Biases as a mirror of the run: never a prompt, never a hang, never a reason to stop."""

import netrc
import os
import socket
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import wandb

from .classes import IGNORE_INDEX

FAILURES = (wandb.errors.Error, OSError, ValueError)  # ValueError: settings that W&B does not accept
TIMEOUT = "60"  # seconds that W&B may take to start, and to finish


def choose_mode() -> str:
    """WANDB_MODE if that is not "online"; else "online" with a key and a server that answers, and "offline" without."""
    asked = os.environ.get("WANDB_MODE", "online")
    if asked != "online":
        return asked
    server = urlsplit(wandb.Settings().base_url)
    if not (os.environ.get("WANDB_API_KEY") or _key_in_netrc(server.hostname)):
        return "offline"
    try:
        socket.create_connection((server.hostname, server.port or 443), timeout=3).close()
    except OSError:
        warnings.warn(
            f"W&B: {server.hostname} does not answer; logging offline, `wandb sync` uploads later", stacklevel=2
        )
        return "offline"
    return "online"


def _key_in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def mirrored(method: Callable) -> Callable:
    """Let a Tracker's method do nothing without a W&B run; its first failure is a warning, and the end of logging."""

    @wraps(method)
    def guarded(self: "Tracker", *values: object) -> None:
        if self.wandb_run is None:
            return
        try:
            method(self, *values)
        except FAILURES as error:
            self.wandb_run = None
            warnings.warn(f"W&B: logging stopped ({error}); the run goes on", stacklevel=2)

    return guarded


class Tracker:
    """One W&B run; each method logs one kind of thing."""

    def __init__(self, project: str, run: Path, config: dict) -> None:
        for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
            os.environ.setdefault(name, TIMEOUT)
        run.mkdir(parents=True, exist_ok=True)
        os.environ["WANDB_DATA_DIR"] = str(run.resolve() / "wandb")  # artifacts are staged there by absolute path
        self.wandb_run = None
        for choose in (choose_mode, lambda: "offline"):
            try:
                self.wandb_run = self._start(choose(), project, run, config)
                break
            except FAILURES as error:
                warnings.warn(f"W&B: start failed ({error})", stacklevel=2)
                wandb.teardown()

    def _start(self, mode: str, project: str, run: Path, config: dict) -> "wandb.Run":
        settings = wandb.Settings(silent=True, console="off", disable_git=True)
        names = {"name": f"{run.parent.name}-{run.name}", "group": run.parent.name or None, "job_type": config["stage"]}
        started = wandb.init(project=project, dir=str(run), mode=mode, config=config, settings=settings, **names)
        started.define_metric("epoch")
        started.define_metric("*", step_metric="epoch")
        started.define_metric("val/miou", step_metric="epoch", summary="max")
        return started

    @mirrored
    def epoch(self, record: dict) -> None:
        """Log a row of history with its per-class IoU."""
        values = {"epoch": record["epoch"], "lr": record["lr"], "images_per_second": record["images_per_second"]}
        values |= {"train/loss": record["train_loss"], "val/loss": record["val_loss"], "val/miou": record["val_miou"]}
        classes = record["scores"]["classes"].items()
        self.wandb_run.log(values | {f"val/iou/{name}": s["iou"] for name, s in classes if s["iou"] is not None})

    @mirrored
    def pictures(self, images: np.ndarray, masks: np.ndarray, preds: np.ndarray, names: tuple[str, ...]) -> None:
        """Log images (N, H, W, 3) uint8 with truth and prediction (N, H, W) as W&B's mask overlays."""
        labels = dict(enumerate(names)) | {IGNORE_INDEX: "void"}
        pictures = []
        for image, mask, pred in zip(images, masks, preds, strict=True):
            layers = {"truth": mask, "prediction": pred}
            overlays = {key: {"mask_data": value, "class_labels": labels} for key, value in layers.items()}
            pictures.append(wandb.Image(image, masks=overlays, file_type="jpg"))
        self.wandb_run.log({"val/pictures": pictures})

    @mirrored
    def confusion(self, confusion: np.ndarray, names: tuple[str, ...]) -> None:
        """Log a (C, C) matrix of pixel counts, truth x prediction."""
        rows = [[names[t], names[p], int(confusion[t, p])] for t, p in np.ndindex(confusion.shape)]
        table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
        fields = {key: key for key in table.columns}
        preset = "wandb/confusion_matrix/v1"
        self.wandb_run.log({"val/confusion": wandb.plot_table(preset, table, fields, {"title": "val"})})

    @mirrored
    def model(self, weights: Path, metadata: dict[str, str]) -> None:
        """Log the best weights as an artifact."""
        artifact = wandb.Artifact(f"unet-{metadata['stage']}", type="model", metadata=metadata)
        artifact.add_file(str(weights))
        self.wandb_run.log_artifact(artifact, aliases=["best"])

    @mirrored
    def finish(self) -> None:
        """End the W&B run, waiting no longer than WANDB_FINISH_TIMEOUT."""
        self.wandb_run.finish()
