"""The report and the README say what the results files say."""

import shutil
from pathlib import Path

import build
import numpy as np
import pytest

from unetseg import plots, stages
from unetseg.classes import CLASS_SETS
from unetseg.files import read_json
from unetseg.inference import evaluate_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def home(processed, tmp_path_factory):
    """What a finished main job leaves, at a tiny size."""
    home = tmp_path_factory.mktemp("homes") / "tiny"
    shutil.copytree(processed, home / "processed")
    for stage in stages.STAGES:
        init = {} if stage == "scratch" else {"init": str(home / "scratch")}
        tiny = {"epochs": 1, "precision": "fp32"} | ({"channels": 4, "depth": 2} if stage == "scratch" else {})
        settings = stages.Settings(stage, str(home / "processed"), str(home / stage), **init, **tiny)
        settings = stages.resolve(settings)
        stages.train(settings, *stages.load_sets(settings))
        evaluate_run(home / stage, home / "processed")
    return home


def test_a_report_is_built_from_run_folders_and_the_same_twice(home, tmp_path):
    results = build.collect(home)
    first, second = (build.build(home, [results], tmp_path / name).read_bytes() for name in ("a.pdf", "b.pdf"))
    assert first.startswith(b"%PDF") and len(first) > 20_000 and first == second


def test_collect_repeats_the_scores_on_disk(home):
    collected = build.collect(home)
    for stage in stages.STAGES:
        on_disk = read_json(home / stage / "results_test.json")["rules"]["ignore"]
        assert collected["runs"][stage]["scores"]["mIoU"] == on_disk["miou"]
        assert len(collected["runs"][stage]["history"]) == 1


def test_collect_without_scores_says_what_to_do(home, tmp_path):
    shutil.copytree(home / "scratch", tmp_path / "scratch", ignore=shutil.ignore_patterns("results_*"))
    with pytest.raises(ValueError, match="unetseg evaluate"):
        build.collect(tmp_path)


def test_the_readme_shows_the_committed_results():
    files = [read_json(path) for path in sorted((ROOT / "report" / "results").glob("*.json"))]
    assert build.readme_results(files) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert [len(file["seeds"]) >= 3 for file in files if "seeds" in file] == [True]


def test_the_committed_report_is_there_with_its_results():
    assert (ROOT / "report" / "UNet_Model_Training_Report.pdf").read_bytes().startswith(b"%PDF")
    names = {path.name for path in (ROOT / "report" / "results").iterdir()}
    assert names >= {"drawn-quick.json", "predictions.jpg", "samples.jpg"}


def test_figures_are_drawn_for_every_class_set(tmp_path):
    rng = np.random.default_rng(0)
    for name, class_set in CLASS_SETS.items():
        num = len(class_set)
        mask = rng.integers(0, num, (8, 16))
        figures = [
            plots.panels([[class_set.paint(mask)] * 2], ["a", "b"], class_set),
            plots.class_distribution(class_set, {"train": np.full(num + 1, 1 / (num + 1))}),
            plots.confusion_matrix(rng.integers(0, 9, (num, num)), class_set.names),
            plots.iou_by_stage({"one": dict.fromkeys(class_set.names), "two": dict.fromkeys(class_set.names, 0.5)}),
        ]
        for number, figure in enumerate(figures):
            assert plots.save(figure, tmp_path / f"{name}{number}.png").stat().st_size > 2000
