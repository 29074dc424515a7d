"""What crosses a process boundary can: nothing of it is a lambda or a closure, and no process is forked."""

import ast
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import image_segmentation_preprocessing as preprocessing

from unetseg import scenes, tracker
from unetseg.raw import Pair

ROOT = Path(__file__).resolve().parents[1]


def test_what_workers_are_given_can_be_pickled(tmp_path):
    settings = preprocessing.Settings("cityscapes7", (64, 32), "float32")
    job = partial(preprocessing.process, split="train", output=tmp_path, settings=settings, overwrite=False)
    pair = Pair("a", tmp_path / "a.png", None)
    parts = [job, pair, preprocessing.draw_samples, preprocessing.draw_distribution, tracker._mirror, scenes.draw_scene]
    for part in parts:
        pickle.loads(pickle.dumps(part))


def test_no_process_is_forked():
    """Every multiprocessing context that is asked for is spawn, by name."""
    asked = []
    for path in [*ROOT.glob("unetseg/*.py"), *ROOT.glob("preprocessing/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else name
            assert name != "fork", path
            if name == "get_context":
                asked.append(node.args[0].value)
            if name == "ProcessPoolExecutor":
                assert len(node.args) == 2, f"{path.name}: a pool without a context of its own"
    assert len(asked) >= 3 and set(asked) == {"spawn"}


def test_paths_go_through_pathlib():
    for path in ROOT.glob("unetseg/*.py"):
        assert "os.path.join" not in path.read_text(encoding="utf-8"), path


def test_all_of_it_works_where_spawn_is_the_only_way(raw, tmp_path):
    """As on Windows and macOS: a process that can only spawn draws, preprocesses and trains."""
    code = f"""
import multiprocessing, os, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    os.fork = None
    sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "preprocessing")!r}]
    import image_segmentation_preprocessing as preprocessing
    out = {str(tmp_path)!r}
    assert preprocessing.main(["--data_dir", {str(raw)!r}, "--output_dir", out + "/p", "--size", "64x32"]) == 0
    from unetseg.__main__ import main
    tiny = ["--channels", "4", "--depth", "1", "--epochs", "1", "--precision", "fp32"]
    assert main(["train", "scratch", "--data", out + "/p", "--out", out + "/run", *tiny]) == 0
"""
    script = tmp_path / "spawning.py"
    script.write_text(code)
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file() and list(
        (tmp_path / "run" / "wandb").glob("offline-run*")
    )
