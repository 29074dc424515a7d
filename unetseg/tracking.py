"""Weights & Biases as a mirror of the run: never a prompt, never a hang, never a reason to stop."""

import netrc
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
import wandb

from .classes import IGNORE_INDEX

PATIENCE = 5  # seconds that the server may take to answer


class ServerGone(Exception):
    """The server of an online run does not answer any more."""


def choose_mode(say: Callable[[str], None]) -> str:
    """WANDB_MODE if that is not "online"; else "online" with a key that the server takes, and "offline" without."""
    asked = os.environ.get("WANDB_MODE", "online")
    if asked != "online":
        return asked
    server, key = _server_and_key()
    refusal = _refusal(server, key) if key else ""
    if refusal:
        say(f"{refusal}; logging offline, `wandb sync` uploads later")
    return "online" if key and not refusal else "offline"


def _server_and_key() -> tuple[str, str | None]:
    if "WANDB_API_KEY" in os.environ:
        os.environ["WANDB_API_KEY"] = os.environ["WANDB_API_KEY"].strip()  # W&B stumbles over the blanks of pasted ones
    settings = wandb.Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars(os.environ)
    return settings.base_url, os.environ.get("WANDB_API_KEY") or _key_in_netrc(urlsplit(settings.base_url).hostname)


def _refusal(server: str, key: str) -> str:
    """Why nothing can be logged to this server with this key, or "". W&B itself would wait for minutes, or for ever."""
    host = urlsplit(server).hostname
    try:
        ask = {"json": {"query": "{viewer {id}}"}, "auth": ("api", key), "timeout": PATIENCE, "stream": True}
        with requests.post(f"{server}/graphql", **ask) as answer:
            if answer.status_code in (401, 403):
                return f"{host} does not take the key"
            return "" if answer.ok else f"{host} answers with HTTP status {answer.status_code}"
    except (requests.RequestException, OSError, ValueError):
        return f"{host} does not answer"


def _key_in_netrc(host: str) -> str | None:
    try:
        return (netrc.netrc().authenticators(host) or (None, None, None))[2]
    except (OSError, netrc.NetrcParseError):
        return None


class Mirror:
    """One W&B run; each method logs one kind of thing."""

    def __init__(self, project: str, run: Path, config: dict, say: Callable[[str], None]) -> None:
        os.environ["WANDB_DATA_DIR"] = str(run.resolve() / "wandb")  # artifacts are staged there by absolute path
        run.mkdir(parents=True, exist_ok=True)
        mode = choose_mode(say)
        try:
            self.run = self._start(mode, project, run, config)
        except Exception as error:  # nor can W&B's errors be told apart beforehand
            if mode != "online":
                raise
            say(f"online start failed ({error}); logging offline, `wandb sync` uploads later")
            wandb.teardown()
            self.run = self._start("offline", project, run, config)

    def _start(self, mode: str, project: str, run: Path, config: dict) -> "wandb.Run":
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_stats_pid=os.getppid()
        )
        names = {"name": f"{run.parent.name}-{run.name}", "group": run.parent.name or None, "job_type": config["stage"]}
        started = wandb.init(project=project, dir=str(run), mode=mode, config=config, settings=settings, **names)
        started.define_metric("epoch")
        started.define_metric("*", step_metric="epoch")
        started.define_metric("val/miou", step_metric="epoch", summary="max")
        return started

    def check_server(self) -> None:
        """Raise ServerGone when an online run's server does not answer any more: W&B would wait for it."""
        refusal = "" if self.run.settings.mode != "online" else _refusal(*_server_and_key())
        if refusal:
            raise ServerGone(refusal)

    def epoch(self, record: dict) -> None:
        """Log a row of history with its per-class IoU."""
        values = {"epoch": record["epoch"], "lr": record["lr"], "images_per_second": record["images_per_second"]}
        values |= {"train/skipped_steps": record["skipped"]}
        values |= {"train/loss": record["train_loss"], "val/loss": record["val_loss"], "val/miou": record["val_miou"]}
        classes = record["scores"]["classes"].items()
        self.run.log(values | {f"val/iou/{name}": s["iou"] for name, s in classes if s["iou"] is not None})

    def best(
        self, pictures: tuple, confusion: np.ndarray, names: tuple[str, ...], weights: Path, metadata: dict[str, str]
    ) -> None:
        """Log pictures (images, masks, preds), a confusion matrix, and the weights that they come from.

        Not to a server that has gone: W&B would wait for it.
        """
        self.check_server()
        self.pictures(*pictures, names)
        self.confusion(confusion, names)
        self.model(weights, metadata)

    def pictures(self, images: np.ndarray, masks: np.ndarray, preds: np.ndarray, names: tuple[str, ...]) -> None:
        """Log images (N, H, W, 3) uint8 with truth and prediction (N, H, W) as W&B's mask overlays."""
        labels = dict(enumerate(names)) | {IGNORE_INDEX: "void"}
        pictures = []
        for image, mask, pred in zip(images, masks, preds, strict=True):
            layers = {"truth": mask, "prediction": pred}
            overlays = {key: {"mask_data": value, "class_labels": labels} for key, value in layers.items()}
            pictures.append(wandb.Image(image, masks=overlays, file_type="jpg"))
        self.run.log({"val/pictures": pictures})

    def confusion(self, confusion: np.ndarray, names: tuple[str, ...]) -> None:
        """Log a (C, C) matrix of pixel counts, truth x prediction."""
        rows = [[names[t], names[p], int(confusion[t, p])] for t, p in np.ndindex(confusion.shape)]
        table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
        fields = {key: key for key in table.columns}
        preset = "wandb/confusion_matrix/v1"
        self.run.log({"val/confusion": wandb.plot_table(preset, table, fields, {"title": "val"})})

    def model(self, weights: Path, metadata: dict[str, str]) -> None:
        """Log the best weights as an artifact."""
        artifact = wandb.Artifact(f"unet-{metadata['stage']}", type="model", metadata=metadata)
        artifact.add_file(str(weights))
        self.run.log_artifact(artifact, aliases=["best"])

    def finish(self) -> None:
        """End the W&B run."""
        self.check_server()
        self.run.finish()
