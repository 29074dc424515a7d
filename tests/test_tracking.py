"""W&B as it is with no account, a wrong key, and servers that refuse, hang, drop the line or vanish."""

import hashlib
import json
import os
import signal
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import numpy as np
import pytest
import wandb_file

from unetseg.tracker import Tracker
from unetseg.tracking import Mirror, choose_mode

NAMES = ("road", "person")
RECORD = {"epoch": 1, "lr": 1e-3, "images_per_second": 9.0, "train_loss": 1.0, "val_loss": 1.1, "val_miou": 0.4}
SCORES = {"road": dict.fromkeys(("iou", "precision", "recall", "f1"), 0.6)}
SCORES = {"accuracy": 0.7, "classes": SCORES | {"person": dict.fromkeys(("iou", "precision", "recall", "f1"))}}
RECORD |= {"skipped_steps": 0, "gpu_gibibytes": None, "scores": SCORES}
CONFIG = {"stage": "scratch", "seed": 3, "init_sha256": None}
IDS = np.stack([np.zeros((8, 8)), np.eye(8)]).astype(np.uint8)
PICTURES = np.stack([IDS * 255] * 3, axis=-1), IDS, 1 - IDS, NAMES
KEY = "5ec7e7" * 6 + "0000"


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


PROJECT = {"id": "p", "internalId": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
FAMILY = {"__typename": "ArtifactSequence", "name": "unet-scratch", "project": PROJECT}
PARENT = {"__typename": "Artifact", "id": "A17", "artifactSequence": FAMILY, "artifactType": {"name": "model"}}
PARENT |= dict.fromkeys(("versionIndex", "size", "fileCount", "ttlDurationSeconds"), 1)
PARENT |= {"state": "COMMITTED", "digest": "d", "commitHash": "c", "createdAt": "2026-01-01T00:00:00"}
PARENT |= {"description": "", "updatedAt": None, "ttlIsInherited": False, "historyStep": None}
PARENT |= {"tags": [], "aliases": [], "metadata": "{}"}
MEMBER = {"__typename": "ArtifactCollectionMembership", "id": "M", "createdAt": "2026-01-01T00:00:00"}
MEMBER |= {"versionIndex": 1, "aliases": [], "artifactCollection": FAMILY, "artifact": PARENT}
KNOWN = {  # what a server that works answers to a question with this word in it
    b"upsertBucket(": {"upsertBucket": {"bucket": {"id": "r", "name": "r", "project": PROJECT}, "inserted": True}},
    b"serverInfo": {"serverInfo": {"features": []}},
    b"artifactCollectionMembership(": {"project": {"artifactCollectionMembership": MEMBER}},
    b"artifact(name": {"project": {"artifact": PARENT}},  # W&B 0.26 asks so
    b"useArtifact(": {"useArtifact": {"artifact": PARENT}},
}


class Server(ThreadingHTTPServer):
    """As much of W&B's server as a run needs to begin; `how` it answers may change at any time."""

    daemon_threads = True

    def __init__(self, how):
        super().__init__(("127.0.0.1", 0), Answer)
        self.how, self.over, self.asked = how, threading.Event(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        question = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.how == "hang":
            self.server.over.wait()
        if self.server.how in ("hang", "drop"):
            return
        self.server.asked.append(question)
        known = next((answer for field, answer in KNOWN.items() if field in question), {})
        body = json.dumps({"data": {"viewer": {"id": "1", "entity": "e"}, **known}}).encode()
        self.send_response({"ok": 200, "wrong key": 401, "broken": 502}[self.server.how])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def server(no_account, monkeypatch, request):
    """A server that answers as the test's parameter says; None: nobody listens."""
    server = Server(request.param or "ok")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", f"{KEY} ")  # as it is pasted
    if request.param is None:
        server.shutdown()
        server.server_close()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def logged(run):
    """What W&B's transaction logs of a run hold, as bytes."""
    return b"".join(path.read_bytes() for path in run.rglob("*.wandb") if not path.parent.is_symlink())


@pytest.mark.parametrize("asked, mode", [(None, "offline"), ("disabled", "disabled"), ("online", "offline")])
def test_the_mode_without_a_key(no_account, monkeypatch, asked, mode):
    if asked:
        monkeypatch.setenv("WANDB_MODE", asked)
    said = []
    assert choose_mode(said.append) == mode and said == []


@pytest.mark.parametrize("server", ["ok"], indirect=True)
def test_wandb_offline_is_obeyed(server, tmp_path, monkeypatch):
    """What the command `wandb offline` leaves: a file in the folder it was given in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert choose_mode(pytest.fail) == "offline" and not server.asked


@pytest.mark.parametrize("server, said", [
    ("ok", ""),
    ("wrong key", "127.0.0.1 does not take the key"),
    ("broken", "127.0.0.1 answers with HTTP status 502"),
    ("hang", "127.0.0.1 does not answer"),
    ("drop", "127.0.0.1 does not answer"),
    (None, "127.0.0.1 does not answer"),
], indirect=["server"])  # fmt: skip
def test_a_server_that_cannot_be_used_means_offline(server, said, monkeypatch):
    monkeypatch.setattr("unetseg.tracking.PATIENCE", 1)
    heard = []
    assert choose_mode(heard.append) == ("offline" if said else "online")
    assert heard == ([f"{said}; logging offline, `wandb sync` uploads later"] if said else [])


@pytest.mark.parametrize("server", ["wrong key", "drop", None], indirect=True)
def test_a_run_goes_through_with_one_warning_whatever_the_server_does(server, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker = Tracker("test", tmp_path / "run", CONFIG)
        tracker.epoch(RECORD)
        tracker.finish()
    assert len(caught) == 1 and "logging offline" in str(caught[0].message) and KEY not in str(caught[0].message)
    assert b"val/miou" in logged(tmp_path / "run")


@pytest.mark.parametrize("server", ["ok"], indirect=True)
@pytest.mark.parametrize("then", ["hang", "drop"])
def test_a_network_that_goes_in_the_middle_holds_nothing_up(server, then, tmp_path):
    tracker = Tracker("test", tmp_path / "run", CONFIG)
    assert tracker.started.wait(60)
    tracker.epoch(RECORD)
    server.how = then
    tracker.epoch(RECORD | {"epoch": 2})
    start = time.monotonic()
    with pytest.warns(UserWarning, match="does not answer; `wandb sync` uploads later") as caught:
        tracker.best(PICTURES, np.eye(2), SCORES, tmp_path / "none", {"stage": "scratch"})
        tracker.finish()
    assert len(caught) == 1 and time.monotonic() - start < 60 and not tracker.process.is_alive()
    paths = [path for path in (tmp_path / "run").rglob("*.wandb") if not path.parent.is_symlink()]
    assert [row["epoch"] for path in paths for row in wandb_file.history(path) if "epoch" in row] == [1, 2]
    assert KEY.encode() not in logged(tmp_path / "run")


@pytest.mark.parametrize("server", ["ok"], indirect=True)
def test_a_fine_tuning_is_linked_to_the_weights_it_began_with(server, tmp_path):
    config = CONFIG | {"stage": "ce_dice", "init_sha256": "ab" * 32, "init_stage": "scratch"}
    tracker = Tracker("test", tmp_path / "run", config)
    assert tracker.started.wait(60)
    tracker.process.kill()
    assert any(b"unet-scratch:sha-abababababab" in question for question in server.asked)
    uses = [json.loads(question)["variables"] for question in server.asked if b"useArtifact(" in question]
    assert [(use["artifactID"], use["runName"]) for use in uses] == [("A17", "r")]


def test_what_was_logged_is_read_back_from_the_offline_file(no_account, tmp_path):
    """Grouped names, pictures with their classes, confusion, table per class, artifact with aliases, lineage's key."""
    run = tmp_path / "home" / "weighted_ce"
    config = CONFIG | {"stage": "weighted_ce", "init_sha256": "ab" * 32, "init_stage": "scratch"}
    mirror = Mirror("test", run, config, pytest.fail)
    mirror.epoch(RECORD | {"gpu_gibibytes": 1.5}, PICTURES)
    mirror.epoch(RECORD | {"epoch": 2, "val_miou": 0.3})
    (run / "model.safetensors").write_bytes(b"weights")
    mirror.best(PICTURES, np.array([[5, 1], [2, 3]]), SCORES, run / "model.safetensors", {"stage": "weighted_ce"})
    mirror.finish()
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    first, second, best = (row for row in wandb_file.history(path) if set(row) - {"_step", "_runtime", "_timestamp"})
    assert {key: first[key] for key in first if key[0] != "_" and key != "val/pictures"} == {
        "epoch": 1, "train/loss": 1.0, "train/lr": 1e-3, "train/images_per_second": 9.0, "train/skipped_steps": 0,
        "train/gpu_gibibytes": 1.5, "val/loss": 1.1, "val/miou": 0.4, "val/accuracy": 0.7, "val/iou/road": 0.6,
    }  # fmt: skip
    assert first["val/pictures"]["count"] == 2 and len(first["val/pictures"]["all_masks"]) == 2
    assert second["epoch"] == 2 and "val/pictures" not in second and "train/gpu_gibibytes" not in second
    assert {"best/pictures", "best/classes"} < set(best) and any(key.startswith("best/confusion") for key in best)
    about = wandb_file.last(path, "run")
    assert (about.run_group, about.job_type, about.display_name) == ("home", "weighted_ce", "weighted_ce-seed3")
    assert {item.key: json.loads(item.value_json) for item in about.config.update}["init_sha256"] == "ab" * 32
    artifact = wandb_file.last(path, "artifact")
    sha = hashlib.sha256(b"weights").hexdigest()
    assert artifact.name == "unet-weighted_ce" and set(artifact.aliases) == {"best", "latest", f"sha-{sha[:12]}"}
    tables = [json.loads(table.read_text())["data"] for table in path.parent.rglob("*.table.json")]
    assert any(["person", "road", 2] in rows for rows in tables)
    assert any(["road", 0.6, 0.6, 0.6, 0.6] in rows and ["person", *[None] * 4] in rows for rows in tables)
    media = [file.name for file in path.parent.rglob("*.*") if "media" in file.parts]
    assert sum(name.endswith(".jpg") for name in media) == 4 and sum(name.endswith(".mask.png") for name in media) == 8
    assert not [file for file in (run / "wandb").rglob("*") if file.suffix in (".py", ".ipynb", ".sh", ".env")]


def test_a_run_that_goes_on_is_the_same_run_to_wandb(no_account, tmp_path):
    for epoch in (1, 2):
        mirror = Mirror("test", tmp_path / "run", CONFIG, pytest.fail)
        mirror.epoch(RECORD | {"epoch": epoch})
        mirror.finish()
        time.sleep(1.1)  # W&B names folders by the second
    paths = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(paths) == 2 and len({wandb_file.last(path, "run").run_id for path in paths}) == 1
    assert [row["epoch"] for path in paths for row in wandb_file.history(path) if "epoch" in row] == [1, 2]


def test_a_tracker_logs_from_its_own_process(no_account, tmp_path):
    tracker = Tracker("test", tmp_path / "run", CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.epoch(RECORD)
        tracker.finish()
    assert b"val/miou" in logged(tmp_path / "run") and tracker.process.exitcode == 0


@pytest.mark.parametrize("fault", ["nonsense in WANDB_MODE", "no folder can be made"])
def test_a_run_that_cannot_start_stops_nothing(no_account, monkeypatch, tmp_path, fault):
    if fault.startswith("nonsense"):
        monkeypatch.setenv("WANDB_MODE", "bogus")
    else:
        (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="logging stopped") as caught:
        tracker = Tracker("test", tmp_path / "file" / "run", CONFIG)
        tracker.epoch(RECORD)
        tracker.finish()
    assert len(caught) == 1


def test_a_folder_that_takes_no_writing_stops_nothing(no_account, tmp_path):
    """A file where W&B's folder should be: not even the administrator can write into that."""
    (tmp_path / "wandb").touch()
    tracker = Tracker("test", tmp_path, CONFIG)
    tracker.epoch(RECORD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker.finish()
    assert len(caught) <= 1 and not tracker.process.is_alive()


def log_an_epoch_and_die(run):
    tracker = Tracker("test", run, CONFIG)
    tracker.epoch(RECORD)
    tracker.started.wait(60)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_training_leaves_what_it_logged(no_account, tmp_path):
    """W&B writes its file in pieces, the last of them at the run's end; somebody has to end it."""
    training = get_context("spawn").Process(target=log_an_epoch_and_die, args=(tmp_path / "run",))
    training.start()
    training.join()
    assert training.exitcode == -signal.SIGKILL
    end = time.monotonic() + 60
    while b"val/miou" not in logged(tmp_path / "run") and time.monotonic() < end:
        time.sleep(0.1)
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert [row["epoch"] for row in wandb_file.history(path) if "epoch" in row] == [1]
    assert wandb_file.last(path, "exit").exit_code == 1


def test_a_killed_tracker_stops_nothing(no_account, tmp_path):
    tracker = Tracker("test", tmp_path / "run", CONFIG)
    assert tracker.started.wait(60)
    os.kill(tracker.process.pid, signal.SIGKILL)
    tracker.process.join()
    with pytest.warns(UserWarning, match="ended by itself"):
        tracker.epoch(RECORD)
        tracker.finish()
