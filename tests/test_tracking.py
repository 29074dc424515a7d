"""W&B as it is with no account, a wrong key, and servers that refuse, hang, vanish or answer nonsense.

Nothing here asserts how long something takes, but for the 30 seconds that a run may wait in all.
"""

import gzip
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import wandb
import wandb_file

from unetseg import checkpoint, run, tracking
from unetseg.files import read_json, write_json
from unetseg.settings import Settings
from unetseg.train import State

KEY = "5ec7e7" * 6 + "0000"
TINY = {"channels": 4, "depth": 2, "epochs": 2, "batch_size": 4, "precision": "fp32"}
PROJECT = {"id": "p", "internalId": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
FAMILY = {"__typename": "ArtifactSequence", "name": "unet-scratch", "project": PROJECT}
PARENT = {"__typename": "Artifact", "id": "A17", "artifactSequence": FAMILY, "artifactType": {"name": "model"}}
PARENT |= dict.fromkeys(("versionIndex", "size", "fileCount", "ttlDurationSeconds"), 1)
PARENT |= {"state": "COMMITTED", "digest": "d", "commitHash": "c", "createdAt": "2026-01-01T00:00:00"}
PARENT |= {"description": "", "updatedAt": None, "ttlIsInherited": False, "historyStep": None}
PARENT |= {"tags": [], "aliases": [], "metadata": "{}"}
MEMBER = {"__typename": "ArtifactCollectionMembership", "id": "M", "createdAt": "2026-01-01T00:00:00"}
MEMBER |= {"versionIndex": 1, "aliases": [], "artifactCollection": FAMILY, "artifact": PARENT}


class Server(ThreadingHTTPServer):
    """As much of W&B's server as a run needs; `how` it answers may change at any time."""

    daemon_threads = True

    def __init__(self, how):
        super().__init__(("127.0.0.1", 0), Answer)
        self.how, self.over, self.asked, self.deleted = how, threading.Event(), [], ""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, question):
        """The data that GraphQL's question gets."""
        query, variables = question.get("query", ""), question.get("variables") or {}
        data = {"viewer": {"id": "1", "entity": "e", "flags": "{}"}, "project": None}
        name = variables.get("name") or "r"
        if "upsertBucket(" in query:
            bucket = {"id": f"x{name}", "name": name, "displayName": name, "config": "{}", "project": PROJECT}
            data["upsertBucket"] = {"bucket": bucket, "inserted": True}
        if "serverInfo" in query:
            data["serverInfo"] = {"features": []}
        if "createRunFiles" in query:
            data["createRunFiles"] = {"runID": "r", "uploadHeaders": [], "files": []}
        if "createArtifact(" in query:
            data["createArtifact"] = {"artifact": {"id": "A1", "state": "COMMITTED", "artifactSequence": {"id": "S"}}}
        if "artifactCollectionMembership(" in query and "sha-" in json.dumps(variables):
            data["project"] = {"artifactCollectionMembership": MEMBER}
        if "useArtifact(" in query:
            data["useArtifact"] = {"artifact": PARENT}
        return data


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        content = gzip.decompress(content) if self.headers["Content-Encoding"] == "gzip" else content
        if self.server.how == "hangs":
            self.server.over.wait()
        if self.server.how in ("hangs", "drops"):
            return
        self.server.asked.append((self.path, content))
        body, status = {"exitcode": None, "limits": {}}, {"ok": 200, "wrong key": 401}.get(self.server.how, 502)
        if self.path.endswith("/graphql"):
            body = {"data": self.server.answer(json.loads(content))}
            if self.server.deleted and b"upsertBucket(" in content and self.server.deleted.encode() in content:
                text = f"run e/p/{self.server.deleted} was previously created and deleted; try a new run name"
                body, status = {"errors": [{"message": text}], "data": None}, 409
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """No account, no settings."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


@pytest.fixture
def server(nobody, monkeypatch, request):
    """A server that answers as the test's parameter says; "refuses": nobody listens."""
    server = Server(getattr(request, "param", "ok"))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", f"{KEY} ")  # as it is pasted
    monkeypatch.setenv("KAGGLE_KEY", KEY)  # another secret, which no file may hold either
    if server.how == "refuses":
        server.shutdown()
        server.server_close()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def train(processed, tmp_path):
    """Trains two epochs into a folder; returns it and the seconds that it took."""

    def train(name="scratch", **changes):
        start = time.monotonic()
        run.train(Settings("scratch", processed, tmp_path / "home" / name, **TINY | changes))
        return tmp_path / "home" / name, time.monotonic() - start

    return train


def files(folder):
    """W&B's files that hold a run, in order of time: an attempt that failed may leave an empty one, and names tell
    whole seconds only. Its service may go on writing for a moment."""
    sizes = None
    while sizes != (sizes := [path.stat().st_size for path in sorted(folder.rglob("*.wandb"))]):
        time.sleep(1.5)
    paths = [path for path in folder.rglob("*.wandb") if not path.parent.is_symlink()]
    paths = [path for path in paths if any(record.HasField("run") for record in wandb_file.records(path))]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def epochs(folder):
    """The epochs in W&B's files, in order."""
    rows = [row for path in files(folder) for row in wandb_file.history(path)]
    return [row["epoch"] for row in rows if "val/miou" in row]


@pytest.mark.parametrize("server", ["refuses", "hangs", "wrong key"], indirect=True)
def test_a_server_that_cannot_be_used_costs_seconds_and_no_row(server, train, capsys):
    folder, seconds = train()
    said = capsys.readouterr().err
    assert epochs(folder) == [1, 2] and seconds < 30
    assert said.count("logging offline; to upload later: wandb sync --include-online '") == 1 and KEY not in said
    assert not [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_server_that_goes_in_the_middle_costs_seconds_and_no_row(server, train, capsys, monkeypatch):
    log = tracking.Tracker.log
    monkeypatch.setattr(tracking.Tracker, "log", lambda self, row: setattr(server, "how", "hangs") or log(self, row))
    folder, seconds = train()
    assert epochs(folder) == [1, 2] and seconds < 30
    said = capsys.readouterr().err
    (path,) = files(folder)
    assert f"to upload the rest later: wandb sync --include-online '{path.parent}'" in said


def test_the_printed_command_uploads_a_run_that_was_begun_online(server, train, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        log = tracking.Tracker.log
        patch.setattr(tracking.Tracker, "log", lambda self, row: setattr(server, "how", "drops") or log(self, row))
        train()
    advice = capsys.readouterr().err.split("to upload the rest later: ")[1].splitlines()[0]
    server.how = "ok"
    server.asked.clear()
    upload = advice.replace("wandb", f"{sys.executable} -m wandb", 1)
    done = subprocess.run(upload, shell=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    sent = b"".join(question for path, question in server.asked if "file_stream" in path)
    assert sent.count(b"val/miou") >= 2 and b'\\"epoch\\":2' in sent.replace(b" ", b"")


def test_a_run_that_was_deleted_gets_a_new_id_and_all_rows(server, train):
    folder, _ = train()
    server.deleted = read_json(folder / "wandb.json")["id"]
    write_json(folder / "wandb.json", read_json(folder / "wandb.json") | {"epochs": 1})
    train(epochs=3)
    new = read_json(folder / "wandb.json")["id"]
    (path,) = [path for path in files(folder) if wandb_file.last(path, "run").run_id == new != server.deleted]
    assert [row["epoch"] for row in wandb_file.history(path) if "val/miou" in row] == [1, 2, 3]


def test_a_fine_tuning_is_linked_to_the_weights_it_began_with(server, processed, train, tmp_path):
    folder, _ = train()
    tuned = TINY | {"channels": None, "depth": None, "epochs": 1}
    run.train(Settings("ce_dice", processed, tmp_path / "home" / "ce_dice", init=folder, **tuned))
    parent = f"unet-scratch:sha-{checkpoint.weights_sha256(folder)[:12]}".encode()
    assert any(parent in question for _, question in server.asked)
    uses = [json.loads(question)["variables"] for _, question in server.asked if b"useArtifact(" in question]
    name = read_json(tmp_path / "home" / "ce_dice" / "wandb.json")["id"]
    assert [(use["artifactID"], use["runName"]) for use in uses] == [("A17", name)]


@pytest.mark.parametrize("mode, logs", [("", True), ("offline", True), ("online", True), ("disabled", False)])
def test_without_a_key_a_run_is_offline_and_nobody_is_asked(nobody, train, monkeypatch, mode, logs):
    monkeypatch.setenv("WANDB_MODE", mode)
    folder, _ = train()
    assert epochs(folder) == [1, 2] * logs and (folder / "wandb.json").exists() == logs


def test_what_the_user_says_is_obeyed(nobody, train, monkeypatch, tmp_path):
    """The environment over the file of `wandb init`, that over our defaults, and a setting over all."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nproject = of the file\n")
    names = {}
    said = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "my name", "WANDB_RUN_GROUP": "my group"}
    for name, more, project in (("a", {}, {}), ("b", said, {}), ("c", said, {"project": "asked"})):
        for key, value in more.items():
            monkeypatch.setenv(key, value)
        about = wandb_file.last(files(train(name, **project)[0])[0], "run")
        names[name] = about.project, about.display_name, about.run_group, about.job_type
    theirs = "my name", "my group", "scratch"
    of_file = "of the file", "a-seed0", "home", "scratch"
    assert names == {"a": of_file, "b": ("theirs", *theirs), "c": ("asked", *theirs)}


def test_what_was_logged_is_read_back_from_the_offline_file(nobody, train):
    folder, _ = train()
    (path,) = files(folder)
    assert path.parent.name.startswith("offline-run-")
    rows = [row for row in wandb_file.history(path) if set(row) - {"_step", "_runtime", "_timestamp"}]
    first, table, second, final = rows
    history = checkpoint.read_history(folder)
    assert first["train/loss"] == history[0]["train_loss"] and first["val/iou/road"] == history[0]["val_iou_road"]
    assert {"epoch", "train/lr", "train/skipped_steps", "val/loss", "val/accuracy"} <= set(first)
    assert first["val/pictures"]["count"] == 2 and len(first["val/pictures"]["all_masks"]) == 2
    media = next(folder.rglob("media/table/val/*.table.json"))
    columns = ["epoch", "name", "image", "truth", "prediction", "mIoU", "background"]
    assert table["val/table"]["nrows"] == 2 and json.loads(media.read_text())["columns"][:7] == columns
    assert second["epoch"] == 2 and "val/pictures" not in second and "train/gpu_gibibytes" not in second
    assert {"final/pictures", "final/classes"} < set(final) and any(key.startswith("final/confusion") for key in final)
    artifact, sha256 = wandb_file.last(path, "artifact"), checkpoint.weights_sha256(folder)
    assert artifact.name == "unet-scratch" and {"final", f"sha-{sha256[:12]}"} <= set(artifact.aliases)
    tables = [json.loads(table.read_text())["data"] for table in path.parent.rglob("*.table.json")]
    counts = next(rows for rows in tables if len(rows[0]) == 3)
    confusion = checkpoint.load_state(folder, checkpoint.read_config(folder))["confusion"]
    assert sum(row[2] for row in counts) == int(confusion[:-1].sum())
    assert not [file for file in (folder / "wandb").rglob("*") if file.suffix in (".py", ".ipynb", ".sh", ".env")]
    assert read_json(folder / "wandb.json")["weights"] == sha256 and wandb_file.last(path, "exit").exit_code == 0


def test_a_run_that_resumes_is_the_same_run_to_wandb(nobody, train):
    folder, _ = train()
    time.sleep(1.1)  # W&B names folders by the second
    train(epochs=4)
    assert len({wandb_file.last(path, "run").run_id for path in files(folder)}) == 1 == len(files(folder)) - 1
    assert epochs(folder) == [1, 2, 3, 4]


def test_a_failed_run_is_marked_failed(nobody, train, monkeypatch, tmp_path):
    monkeypatch.setattr(State, "end_epoch", lambda *args: (_ for _ in ()).throw(OSError("disk on fire")))
    with pytest.raises(OSError, match="disk on fire"):
        train()
    (path,) = {path.resolve() for path in (tmp_path / "home" / "scratch").rglob("*.wandb")}
    assert wandb_file.last(path, "exit").exit_code == 1


def test_what_a_killed_process_did_not_log_reaches_wandb_later(nobody, train, processed, tmp_path, monkeypatch):
    """Killed after its last epoch was saved, before weights, pictures and confusion matrix were logged."""
    code = f"""
import os, signal
from unetseg import run, tracking
from unetseg.settings import Settings
tracking.Tracker.log_final = lambda self: os.kill(os.getpid(), signal.SIGKILL)
run.train(Settings("scratch", {str(processed)!r}, {str(tmp_path / "home" / "scratch")!r}, **{TINY}))
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "home" / "scratch"
    assert len(checkpoint.read_history(folder)) == 2 and tracking.is_waiting(folder)
    time.sleep(1.1)
    train()
    assert not tracking.is_waiting(folder)
    last = files(folder)[-1]
    assert wandb_file.last(last, "artifact").name == "unet-scratch"
    assert [row["epoch"] for row in wandb_file.history(last) if "val/miou" in row] == [1, 2]


def test_nothing_of_wandb_stops_a_training(nobody, train, monkeypatch, capsys, tmp_path):
    faults = {"a": lambda **more: 1 / 0, "b": lambda **more: (_ for _ in ()).throw(wandb.errors.Error("no"))}
    for name, fault in faults.items():
        monkeypatch.setattr(wandb, "init", fault)
        assert len(checkpoint.read_history(train(name)[0])) == 2
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "bogus")
    assert len(checkpoint.read_history(train("c")[0])) == 2
    assert capsys.readouterr().err.count("warning: W&B: ") >= 3


def test_a_version_that_may_wait_without_end_logs_offline(server, train, monkeypatch, capsys):
    """As 0.26 does, which Kaggle has: it has no time limit for its end."""
    monkeypatch.setattr(tracking, "LIMITS", {})
    folder, _ = train()
    said = capsys.readouterr().err
    assert "may wait for its server without end, so logging offline; to upload later: wandb sync --append" in said
    assert epochs(folder) == [1, 2] and not server.asked
