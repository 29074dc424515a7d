"""What the benchmarks conclude from their times, that the texts say it, and the CPU half of the GPU's checks."""

import subprocess
import sys

import measure
import pytest
import table
import training
from conftest import ROOT

from unetseg.data import load_split
from unetseg.files import read_json


def test_a_comparison_is_the_other_ones_time_over_ours():
    row = measure.compare("a", "b", lambda: 1.0, lambda: 3.0, images=8)
    assert row.ratios == [3.0] * measure.ROUNDS and row.notes == {"images_per_second": 8.0}


def test_the_loops_of_training_run(processed, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load", lambda home, images: load_split(processed, "train"))
    for loop in (training.our_epoch, training.bare_epoch):
        loop("default", tmp_path, 6)()


@pytest.mark.parametrize("name", table.TEXTS)
def test_the_texts_show_the_committed_speeds(name):
    files, against = table.committed(), table.TEXTS[name][1]
    text, record = (ROOT / name).read_text(encoding="utf-8"), table.record(read_json(table.RESULTS / "quality.json"))
    assert files and table.markdown(files, against) in text and record in text


def test_the_checks_for_a_gpu_run_on_a_cpu_as_far_as_they_can(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "gpu.json"), "--home", str(tmp_path)]
    done = subprocess.run([*command, "--seconds", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_json(tmp_path / "gpu.json")
    assert found["deterministic_resume"]["equal"] and found["skipped_steps"]["skipped_steps"][0] >= 2
    assert found["card"]["precision_rule"] in ("fp32", "bf16", "fp16")
    assert found["images_per_second"]["quick"]["fp32"] > 0
