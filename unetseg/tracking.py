"""Weights & Biases as a mirror of the run: never a prompt, never a hang, never a reason to stop."""

import contextlib
import hashlib
import netrc
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import requests
import wandb

from .classes import IGNORE_INDEX

PATIENCE = 5  # seconds that the server may take to answer


class ServerGone(Exception):
    """The server of an online run does not answer any more."""


def choose_mode(say: Callable[[str], None]) -> str:
    """What W&B is told to (WANDB_MODE, `wandb offline`), if not "online"; else that, if the server takes a key."""
    asked = os.environ.get("WANDB_MODE") or _settings().mode
    if asked != "online":
        return asked
    server, key = server_and_key()
    refusal = _refusal(server, key) if key else ""
    if refusal:
        say(f"{refusal}; logging offline, `wandb sync` uploads later")
    return "online" if key and not refusal else "offline"


def _settings() -> "wandb.Settings":
    if "WANDB_API_KEY" in os.environ:
        os.environ["WANDB_API_KEY"] = os.environ["WANDB_API_KEY"].strip()  # W&B stumbles over the blanks of pasted ones
    settings = wandb.Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars(os.environ)
    return settings


def server_and_key() -> tuple[str, str | None]:
    """Where W&B's server is, and the user's key for it, if there is one."""
    settings = _settings()
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
        self.about, self.rows = (project, run, config), []  # the rows: all epochs' numbers, as they were logged
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
        names = {
            "name": f"{run.name}-seed{config['seed']}",
            "group": run.resolve().parent.name,
            "job_type": config["stage"],
        }
        names |= {"id": run_id(run), "resume": "allow"}
        started = wandb.init(project=project, dir=str(run), mode=mode, config=config, settings=settings, **names)
        started.define_metric("epoch")
        started.define_metric("*", step_metric="epoch")
        for name in ("val/miou", "val/accuracy"):
            started.define_metric(name, step_metric="epoch", summary="max")
        if mode == "online" and config.get("init_sha256"):
            with contextlib.suppress(Exception):  # the parent was logged elsewhere, or offline
                started.use_artifact(f"unet-{config['init_stage']}:{alias(config['init_sha256'])}")
        return started

    def check_server(self) -> None:
        """Raise ServerGone when an online run's server does not answer any more: W&B would wait for it."""
        refusal = "" if self.run.settings.mode != "online" else _refusal(*server_and_key())
        if refusal:
            raise ServerGone(refusal)

    def epoch(self, record: dict, pictures: tuple | None = None) -> None:
        """Log a row of history with its scores and, where there are some, pictures (images, masks, preds, names)."""
        values = {"epoch": record["epoch"]}
        values |= {f"train/{key}": record[key] for key in ("lr", "images_per_second", "skipped_steps")}
        values |= {"train/loss": record["train_loss"], "val/loss": record["val_loss"], "val/miou": record["val_miou"]}
        values |= {"train/gpu_gibibytes": record["gpu_gibibytes"], "val/accuracy": record["scores"]["accuracy"]}
        values |= {f"val/iou/{name}": of["iou"] for name, of in record["scores"]["classes"].items()}
        self.rows.append({key: value for key, value in values.items() if value is not None})
        self.run.log(self.rows[-1] | ({"val/pictures": overlays(*pictures)} if pictures else {}))

    def best(self, pictures: tuple, confusion: np.ndarray, scores: dict, weights: Path, metadata: dict) -> None:
        """Log what the best weights do, and the weights: pictures (images, masks, preds, names), confusion and scores.

        confusion  (C, C) pixel counts, truth x prediction
        Not to a server that has gone: W&B would wait for it.
        """
        self.check_server()
        names = pictures[-1]
        rows = [[names[t], names[p], int(confusion[t, p])] for t, p in np.ndindex(confusion.shape)]
        counts = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
        fields, preset = {key: key for key in counts.columns}, "wandb/confusion_matrix/v1"
        columns = ("iou", "precision", "recall", "f1")
        rows = [[name, *(of[key] for key in columns)] for name, of in scores["classes"].items()]
        self.run.log(
            {
                "best/pictures": overlays(*pictures),
                "best/confusion": wandb.plot_table(preset, counts, fields, {"title": "val, pixels"}),
                "best/classes": wandb.Table(columns=["class", *columns], data=rows),
            }
        )
        artifact = wandb.Artifact(f"unet-{metadata['stage']}", type="model", metadata=metadata)
        artifact.add_file(str(weights))
        self.run.log_artifact(artifact, aliases=["best", alias(hashlib.sha256(weights.read_bytes()).hexdigest())])

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run."""
        self.check_server()
        self.run.finish(exit_code)

    def leave_server(self) -> None:
        """End an online run whose server has gone, with all its numbers in W&B's files."""
        if not hasattr(self.run.settings, "x_transaction_log_flush_interval"):
            return self._log_again_offline()
        ending = threading.Thread(target=self.run.finish, daemon=True)  # waits for the server without an end
        ending.start()
        ending.join(4 * PATIENCE)

    def _log_again_offline(self) -> None:
        """W&B before 0.31 keeps its file's last 32 KiB in memory until the run has ended (wandb/wandb#12742)."""
        for process in psutil.Process().children(recursive=True):
            process.kill()
        with contextlib.suppress(SystemExit, OSError):  # W&B misses its process
            wandb.teardown()
        self.run = self._start("offline", *self.about)
        for row in self.rows:
            self.run.log(row)
        self.run.finish()


def overlays(images: np.ndarray, masks: np.ndarray, preds: np.ndarray, names: tuple[str, ...]) -> list:
    """Images (N, H, W, 3) uint8 with truth and prediction (N, H, W) as W&B's mask overlays."""
    labels = dict(enumerate(names)) | {IGNORE_INDEX: "void"}
    pictures = []
    for image, mask, pred in zip(images, masks, preds, strict=True):
        layers = {"truth": mask, "prediction": pred}
        layers = {key: {"mask_data": value, "class_labels": labels} for key, value in layers.items()}
        pictures.append(wandb.Image(image, masks=layers, file_type="jpg"))
    return pictures


def alias(sha256: str) -> str:
    """The alias by which the artifact with these weights is found again."""
    return f"sha-{sha256[:12]}"


def run_id(run: Path) -> str:
    """The W&B id of a run folder, the same whenever its training goes on."""
    path = run / "wandb_id.txt"
    if not path.is_file():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
