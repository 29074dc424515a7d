"""W&B as it is with no account, a wrong key, and servers that refuse, hang, drop the line or vanish."""

import json
import os
import signal
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from unetseg.tracker import Tracker
from unetseg.tracking import Mirror, choose_mode

NAMES = ("road", "person")
RECORD = {"epoch": 1, "lr": 1e-3, "images_per_second": 9.0, "train_loss": 1.0, "val_loss": 1.1, "val_miou": 0.4}
RECORD |= {"skipped": 0, "scores": {"classes": {"road": {"iou": 0.6}, "person": {"iou": None}}}}
IDS = np.stack([np.zeros((8, 8)), np.eye(8)]).astype(np.uint8)
PICTURES = np.stack([IDS * 255] * 3, axis=-1), IDS, 1 - IDS
KEY = "5ec7e7" * 6 + "0000"


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


class Server(ThreadingHTTPServer):
    """As much of W&B's server as a run needs to begin; `how` it answers may change at any time."""

    daemon_threads = True

    def __init__(self, how):
        super().__init__(("127.0.0.1", 0), Answer)
        self.how, self.over = how, threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        question = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.how == "hang":
            self.server.over.wait()
        if self.server.how in ("hang", "drop"):
            return
        run = {"id": "r", "name": "r", "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}}
        known = {"upsertBucket": {"bucket": run, "inserted": True}} if b"upsertBucket" in question else {}
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


def logged(run):
    """What W&B's transaction log of a run holds, as bytes."""
    (log,) = [path for path in run.rglob("*.wandb") if not path.parent.is_symlink()]
    return log.read_bytes()


@pytest.mark.parametrize("asked, mode", [(None, "offline"), ("disabled", "disabled"), ("online", "offline")])
def test_the_mode_without_a_key(no_account, monkeypatch, asked, mode):
    if asked:
        monkeypatch.setenv("WANDB_MODE", asked)
    said = []
    assert choose_mode(said.append) == mode and said == []


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
        tracker = Tracker("test", tmp_path / "run", {"stage": "scratch"})
        tracker.epoch(RECORD)
        tracker.finish()
    assert len(caught) == 1 and "logging offline" in str(caught[0].message) and KEY not in str(caught[0].message)
    assert b"val/miou" in logged(tmp_path / "run")


@pytest.mark.parametrize("server", ["ok"], indirect=True)
@pytest.mark.parametrize("then", ["hang", "drop"])
def test_a_network_that_goes_in_the_middle_holds_nothing_up(server, then, tmp_path):
    tracker = Tracker("test", tmp_path / "run", {"stage": "scratch"})
    assert tracker.started.wait(60)
    tracker.epoch(RECORD)
    server.how = then
    tracker.epoch(RECORD | {"epoch": 2})
    start = time.monotonic()
    with pytest.warns(UserWarning, match="does not answer; `wandb sync` uploads later") as caught:
        tracker.best(PICTURES, np.eye(2), NAMES, tmp_path / "none", {"stage": "scratch"})
        tracker.finish()
    assert len(caught) == 1 and time.monotonic() - start < 60 and not tracker.process.is_alive()
    assert b"val/miou" in logged(tmp_path / "run") and KEY.encode() not in logged(tmp_path / "run")


def test_everything_is_logged_offline(no_account, tmp_path):
    run = tmp_path / "home" / "scratch"
    mirror = Mirror("test", run, {"stage": "scratch", "lr": 1e-3}, pytest.fail)
    mirror.epoch(RECORD)
    (run / "model.safetensors").write_bytes(b"weights")
    mirror.best(PICTURES, np.array([[5, 1], [2, 3]]), NAMES, run / "model.safetensors", {"stage": "scratch"})
    assert dict(mirror.run.config) == {"stage": "scratch", "lr": 1e-3}
    summary = dict(mirror.run.summary)
    mirror.finish()
    assert summary["val/iou/road"] == 0.6 and "val/iou/person" not in summary and summary["train/loss"] == 1.0
    (folder,) = (run / "wandb").glob("offline-run-*")
    media = [path.name for path in folder.rglob("*.*") if "media" in path.parts]
    assert sum(name.endswith(".jpg") for name in media) == 2 and sum(name.endswith(".mask.png") for name in media) == 4
    assert not [path for path in (run / "wandb").rglob("*") if path.suffix in (".py", ".ipynb", ".sh", ".env")]
    (table,) = folder.rglob("*.table.json")
    assert ["person", "road", 2] in json.loads(table.read_text())["data"]


def test_a_tracker_logs_from_its_own_process(no_account, tmp_path):
    tracker = Tracker("test", tmp_path / "run", {"stage": "scratch"})
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
        tracker = Tracker("test", tmp_path / "file" / "run", {"stage": "scratch"})
        tracker.epoch(RECORD)
        tracker.finish()
    assert len(caught) == 1


def test_a_folder_that_takes_no_writing_stops_nothing(no_account, tmp_path):
    """A file where W&B's folder should be: not even the administrator can write into that."""
    (tmp_path / "wandb").touch()
    tracker = Tracker("test", tmp_path, {"stage": "scratch"})
    tracker.epoch(RECORD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracker.finish()
    assert len(caught) <= 1 and not tracker.process.is_alive()


def test_a_killed_tracker_stops_nothing(no_account, tmp_path):
    tracker = Tracker("test", tmp_path / "run", {"stage": "scratch"})
    assert tracker.started.wait(60)
    os.kill(tracker.process.pid, signal.SIGKILL)
    tracker.process.join()
    with pytest.warns(UserWarning, match="ended by itself"):
        tracker.epoch(RECORD)
        tracker.finish()
