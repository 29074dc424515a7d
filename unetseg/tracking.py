"""Weights & Biases as a mirror of the run: never a prompt, never a hang, never a reason to stop."""

import netrc
import os
import socket
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import wandb

from .classes import IGNORE_INDEX

TIMEOUT = "60"  # seconds that W&B may take to start, and to finish


def choose_mode() -> str:
    """WANDB_MODE if it is set; else "online" with a key and a server that answers, else "offline"."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
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


class Tracker:
    """One W&B run. Each method logs one kind of thing; after the first failure all of them are silent."""

    def __init__(self, project: str, run: Path, config: dict) -> None:
        for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
            os.environ.setdefault(name, TIMEOUT)
        os.environ["WANDB_DATA_DIR"] = str(run.resolve() / "wandb")  # artifacts are staged there by absolute path
        run.mkdir(parents=True, exist_ok=True)
        self.wandb_run = None
        for mode in dict.fromkeys((choose_mode(), "offline")):
            try:
                self.wandb_run = self._start(mode, project, run, config)
                break
            except (wandb.errors.Error, OSError) as error:
                warnings.warn(f"W&B: {mode} start failed ({error})", stacklevel=2)
                wandb.teardown()

    def _start(self, mode: str, project: str, run: Path, config: dict) -> "wandb.Run":
        settings = wandb.Settings(silent=True, console="off", disable_git=True)
        names = {"name": f"{run.parent.name}-{run.name}", "group": run.parent.name or None, "job_type": config["stage"]}
        started = wandb.init(project=project, dir=str(run), mode=mode, config=config, settings=settings, **names)
        started.define_metric("epoch")
        started.define_metric("*", step_metric="epoch")
        started.define_metric("val/miou", step_metric="epoch", summary="max")
        return started

    def _log(self, values: dict) -> None:
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.log(values)
        except (wandb.errors.Error, OSError) as error:
            warnings.warn(f"W&B: logging stopped ({error}); the run goes on", stacklevel=2)
            self.wandb_run = None

    def epoch(self, record: dict) -> None:
        """Log a row of history with its per-class IoU."""
        values = {"epoch": record["epoch"], "lr": record["lr"], "images_per_second": record["images_per_second"]}
        values |= {"train/loss": record["train_loss"], "val/loss": record["val_loss"], "val/miou": record["val_miou"]}
        classes = record["scores"]["classes"].items()
        self._log(values | {f"val/iou/{name}": s["iou"] for name, s in classes if s["iou"] is not None})

    def pictures(self, images: np.ndarray, masks: np.ndarray, preds: np.ndarray, names: tuple[str, ...]) -> None:
        """Log images (N, H, W, 3) uint8 with truth and prediction (N, H, W) as W&B's mask overlays."""
        labels = dict(enumerate(names)) | {IGNORE_INDEX: "void"}

        def picture(image: np.ndarray, mask: np.ndarray, pred: np.ndarray) -> wandb.Image:
            layers = {"truth": mask, "prediction": pred}
            overlays = {key: {"mask_data": value, "class_labels": labels} for key, value in layers.items()}
            return wandb.Image(image, masks=overlays, file_type="jpg")

        if self.wandb_run is not None:
            self._log({"val/pictures": [picture(*layers) for layers in zip(images, masks, preds, strict=True)]})

    def confusion(self, confusion: np.ndarray, names: tuple[str, ...]) -> None:
        """Log a (C, C) matrix of pixel counts, truth x prediction."""
        if self.wandb_run is None:
            return
        rows = [[names[t], names[p], int(confusion[t, p])] for t, p in np.ndindex(confusion.shape)]
        table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
        fields = {key: key for key in table.columns}
        self._log({"val/confusion": wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "val"})})

    def model(self, weights: Path, metadata: dict[str, str]) -> None:
        """Log the best weights as an artifact."""
        if self.wandb_run is None:
            return
        try:
            artifact = wandb.Artifact(f"unet-{metadata['stage']}", type="model", metadata=metadata)
            artifact.add_file(str(weights))
            self.wandb_run.log_artifact(artifact, aliases=["best"])
        except (wandb.errors.Error, OSError) as error:
            warnings.warn(f"W&B: the model was not logged ({error})", stacklevel=2)

    def finish(self) -> None:
        """End the W&B run, waiting no longer than WANDB_FINISH_TIMEOUT."""
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.finish()
        except (wandb.errors.Error, OSError) as error:
            warnings.warn(f"W&B: {error}; `wandb sync {self.wandb_run.dir}` uploads the rest", stacklevel=2)
