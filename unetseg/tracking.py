"""Weights & Biases as a mirror of the run: it never prompts, never stops training, and waits less than 30 s in all."""

import contextlib
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoint
from .classes import IGNORE_INDEX, stored
from .data import SegmentationSet
from .files import UserError, read_json, write_json
from .inference import predictions, spread, trained_model
from .metrics import confusion_matrices, iou, miou, scores, under_rule
from .train import State

LIMITS = {"init_timeout": 8, "finish_timeout": 6, "finish_timeout_raises": True}  # seconds that W&B may wait
LIMITS |= {"x_transaction_log_flush_interval": 1}  # and until a row is on disk, whatever becomes of this process
PICTURES, PICTURE_STEPS = 4, 25  # val images shown over time; training steps between two times at least
RECORD = "wandb.json"  # in the run folder: W&B's id, how many epochs W&B has, and which weights


class Tracker:
    """The W&B run of a run folder while it trains, as a context; problems are printed, never raised."""

    def __init__(self, folder: Path, config: dict, val_set: SegmentationSet, state: State) -> None:
        self.folder, self.config, self.val_set, self.state, self.run = folder, config, val_set, state, None
        self.tables = True
        new = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else secrets.token_hex(4)
        self.record = {"id": new, "epochs": 0, "weights": None} | read_record(folder)
        self.every = max(1, config["cycles"][-1] // 10, -(-PICTURE_STEPS // state.steps_per_epoch))

    def __enter__(self) -> "Tracker":
        with print_problems():
            self.start()
            for row in self.state.history[self.record["epochs"] :] if self.run else ():  # of a session that was killed
                self.run.log(values(row))
        return self

    def start(self) -> None:
        """Begin or continue the W&B run: online, or offline where there is no key or the server does not answer."""
        settings = user_settings()
        if settings.mode == "disabled":
            return
        import wandb

        limits = {key: value for key, value in LIMITS.items() if key in wandb.Settings.model_fields}
        self.bounded, online, why = "finish_timeout" in limits, settings.mode == "online" and has_key(settings), ""
        if online and not self.bounded:
            online, why = False, f"wandb {wandb.__version__} may wait for its server without end, so"
        options = self.options(settings) | {"settings": wandb.Settings(silent=True, console="off", **limits)}
        attempts = ["online"] * 2 * bool(online) + ["offline" if settings.mode == "online" else settings.mode] * 2
        while attempts and not self.run:
            options["mode"] = attempts.pop(0)
            try:
                self.run = wandb.init(id=self.record["id"], **options)
                why = "" if options["mode"] == "online" else why
            except Exception as error:  # of W&B, or of its service that has died
                why = f"{str(error).strip()[:100]};"
                wandb.teardown()
                if options["mode"] == "online" and "previously created and deleted" not in why:
                    attempts = attempts[-2:]
                else:  # a deleted id is never free again
                    self.record |= {"id": secrets.token_hex(4), "epochs": 0}
        if not self.run:
            raise RuntimeError(f"not logging: {why}")
        self.patience = 60 if self.run.offline else 6  # seconds for a call: offline, only this machine can be slow
        if why:
            tqdm.write(f"warning: W&B: {why} logging offline; to upload later: {self.upload_command()}", sys.stderr)
        write_json(self.folder / RECORD, self.record)
        self.describe(online and not why)

    def describe(self, online: bool) -> None:
        """Tell W&B what the rows' axis is, and which weights the run started from."""
        self.run.define_metric("*", step_metric="epoch")
        if online and self.config["init_sha256"]:
            stage = checkpoint.read_about(Path(self.config["settings"]["init"]))["stage"]
            with contextlib.suppress(Exception):  # the parent was logged elsewhere, or offline
                bounded(4, lambda: self.run.use_artifact(f"unet-{stage}:{alias(self.config['init_sha256'])}"))

    def options(self, settings) -> dict:
        """Arguments of wandb.init; what the environment and `wandb init` say wins over our defaults."""
        os.environ["WANDB_DATA_DIR"] = str(self.folder.resolve() / "wandb")  # artifacts are staged there
        ours, facts = self.config["settings"], {k: v for k, v in self.config.items() if k not in ("format", "data")}
        facts |= {f"{name}_sha256": split["sha256"] for name, split in self.config["data"].items()}
        options = {"dir": str(self.folder), "config": facts, "resume": "allow", "mode": settings.mode}
        options |= {"project": ours["project"] or settings.project or "unetseg", "job_type": ours["stage"]}
        options |= {"name": settings.run_name or f"{self.folder.name}-seed{ours['seed']}"}
        return options | {"group": settings.run_group or self.folder.resolve().parent.name}

    def log(self, row: dict) -> None:
        """Log a row of the history and, now and then, what the network makes of the same few val images."""
        with print_problems():
            if not self.run:
                return
            if row["epoch"] > 1 and row["epoch"] % self.every:
                self.run.log(values(row))
                return
            shown = predictions(self.state.average.module, self.val_set, PICTURES, self.state.precision)
            self.run.log(values(row) | {"val/pictures": overlays(*shown, self.config["classes"])})
            if self.tables:  # which ask the server first; one that does not answer is asked once
                self.tables = False
                table = self.table(row["epoch"], *shown)
                bounded(self.patience, lambda: self.run.log({"epoch": row["epoch"], "val/table": table}))
                self.tables = True

    def table(self, epoch: int, images: np.ndarray, masks: np.ndarray, preds: np.ndarray) -> object:
        """A row per image: itself, truth and prediction in the classes' colours, mIoU, and the IoU of each class."""
        import wandb

        class_set, void = stored(self.config), self.state.void
        confusions = confusion_matrices(torch.from_numpy(preds), torch.from_numpy(masks), len(class_set)).numpy()
        places = spread(self.val_set, PICTURES).tolist()
        table = wandb.Table(["epoch", "name", "image", "truth", "prediction", "mIoU", *class_set.names])
        for place, image, mask, pred, confusion in zip(places, images, masks, preds, confusions):
            pictures = (wandb.Image(x, file_type="jpg") for x in (image, class_set.paint(mask), class_set.paint(pred)))
            counts = under_rule(confusion, void)
            ious = [None if value != value else float(value) for value in (miou(counts), *iou(counts))]
            table.add_data(epoch, self.val_set.split.images[place], *pictures, *ious)
        return table

    def log_final(self) -> None:
        """Log what the final weights do on val (pictures, confusion matrix, scores), and the weights."""
        import wandb

        names, last, weights = self.config["classes"], self.state.history[-1], self.folder / checkpoint.WEIGHTS
        confusion, sha256 = self.state.confusion.numpy(), checkpoint.weights_sha256(self.folder)
        counts = under_rule(confusion, self.state.void)
        rows = [[names[t], names[p], int(counts[t, p])] for t, p in np.ndindex(counts.shape)]
        table = wandb.Table(["Actual", "Predicted", "nPredictions"], rows)
        fields, columns = {key: key for key in table.columns}, ("iou", "precision", "recall", "f1")
        score = scores(confusion, names, self.state.void)["classes"]
        shown = predictions(trained_model(self.folder)[0], self.val_set, PICTURES)
        chart = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "val, pixels"})
        rows = [[name, *(found[key] for key in columns)] for name, found in score.items()]
        logged = {"final/pictures": overlays(*shown, names), "final/confusion": chart}
        logged["final/classes"] = wandb.Table(["class", *columns], rows)
        facts = {"epoch": last["epoch"], "val_miou": last["val_miou"], "sha256": sha256}
        artifact = wandb.Artifact(f"unet-{self.config['settings']['stage']}", type="model", metadata=facts)
        artifact.add_file(str(weights))

        def send() -> None:  # tables and files ask the server first, which may not answer
            self.run.log(logged)
            self.run.log_artifact(artifact, aliases=["final", alias(sha256)])

        bounded(self.patience, send)
        self.record["weights"] = sha256

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not self.run:
            return
        failed, done = kind is not None and issubclass(kind, Exception), len(self.state.history)
        with print_problems(f"; to upload it later: {self.upload_command()}"):
            if not failed and done == self.config["cycles"][-1]:
                self.log_final()
        with print_problems(f"; to upload the rest later: {self.upload_command()}"):
            write_json(self.folder / RECORD, self.record | {"epochs": done})
            bounded(8, lambda: self.run.finish(int(failed)))

    def upload_command(self) -> str:
        """What uploads this session later: of several sessions the oldest first."""
        how = "--include-online" if self.bounded else "--append"
        return f"wandb sync {how} '{Path(self.run.dir).parent}'"


@contextlib.contextmanager
def print_problems(advice: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever happens to W&B, training goes on
        tqdm.write(f"warning: W&B: {str(error).strip()[:300]}{advice}", sys.stderr)


def bounded(seconds: float, call: Callable[[], object]) -> None:
    """Call in a thread of its own. Raises its error, or TimeoutError when it takes longer."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds} s")
    if errors:
        raise RuntimeError(str(errors[0])) from errors[0]


def user_settings():
    """What WANDB_* and the files of `wandb init` and `wandb offline` say; an empty variable counts as not set."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        os.environ[name] = os.environ[name].strip()  # pasted keys have blanks
        if not os.environ[name]:
            del os.environ[name]
    import wandb

    settings = wandb.Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars(os.environ)
    return settings


def has_key(settings) -> bool:
    """Whether there is a key, in the environment or in ~/.netrc; asks neither the user nor the server."""
    with contextlib.suppress(Exception):  # W&B's own reader is internal to it
        from wandb.sdk.lib.wbauth import wbnetrc

        return bool(settings.api_key or wbnetrc.read_netrc_auth(host=settings.base_url))
    return False


def read_record(folder: Path) -> dict:
    with contextlib.suppress(UserError):
        return read_json(folder / RECORD)
    return {}


def is_waiting(folder: Path) -> bool:
    """Whether W&B lacks the weights of a finished run, because the process was killed before its last step."""
    record = read_record(folder)
    return bool(record) and record.get("weights") != checkpoint.weights_sha256(folder)


def values(row: dict) -> dict:
    """A row of the history under W&B's names: train/loss, val/miou, val/iou/<class> ..."""
    names = {key: f"train/{key.removeprefix('train_')}" for key in row} | {"epoch": "epoch"}
    names |= {key: f"val/{key[4:].replace('iou_', 'iou/', 1)}" for key in row if key.startswith("val_")}
    return {names[key]: value for key, value in row.items() if value is not None}


def overlays(images: np.ndarray, masks: np.ndarray, preds: np.ndarray, names: list[str]) -> list:
    """Images (N, H, W, 3) uint8 with truth and prediction (N, H, W) as W&B's mask overlays."""
    import wandb

    labels, pictures = dict(enumerate(names)) | {IGNORE_INDEX: "void"}, []
    for image, *both in zip(images, masks, preds, strict=True):
        layers = {key: {"mask_data": ids, "class_labels": labels} for key, ids in zip(("truth", "prediction"), both)}
        pictures.append(wandb.Image(image, masks=layers, file_type="jpg"))
    return pictures


def alias(sha256: str) -> str:
    """The alias by which the artifact with these weights is found again."""
    return f"sha-{sha256[:12]}"
