"""The report and the README say what the results files say."""

import json
import re
import shutil

import build
import numpy as np
import pytest
from conftest import ROOT
from pypdf import PdfReader

from unetseg import plots
from unetseg.classes import CLASS_SETS
from unetseg.files import UserError, read_json
from unetseg.settings import TITLES


def test_a_report_is_built_from_run_folders_and_the_same_twice(made, tmp_path):
    results = build.collect(made)
    first, second = (build.build(made, [results], tmp_path / name).read_bytes() for name in ("a.pdf", "b.pdf"))
    assert first.startswith(b"%PDF") and len(first) > 20_000 and first == second


def test_collect_repeats_the_scores_on_disk(made):
    collected = build.collect(made)
    for stage in TITLES:
        on_disk = read_json(made / stage / "results_test.json")["rules"]["ignore"]
        assert collected["runs"][stage]["scores"]["mIoU"] == on_disk["miou"]
        assert len(collected["runs"][stage]["history"]) == 2


def test_collect_without_scores_says_what_to_do(made, tmp_path):
    shutil.copytree(made / "scratch", tmp_path / "scratch", ignore=shutil.ignore_patterns("results_*"))
    with pytest.raises(UserError, match="unetseg evaluate"):
        build.collect(tmp_path)


def test_names_in_results_reach_readme_and_report_as_text(made, tmp_path):
    """Names of folders, classes and runs: no markup, no link, no marker, no path."""
    hostile = ["<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "../../up", "![](http://example.org/x.png)",
               "#import \"x\"", "*$x$*", "<!-- end of results -->", "a | b"]  # fmt: skip
    collected = build.collect(made)
    text = json.dumps(collected)
    for old, new in zip(("background", "road", "building", "vehicle", "person", "vegetation", "sky", "tiny"), hostile):
        text = text.replace(json.dumps(old), json.dumps(new))
    plans = committed_plans()
    for plan in plans.values():
        for row, name in zip(plan["rows"].values(), hostile):
            row["title"] = name
    for shown in (table for parts in build.tables(plans).values() for table in parts.values()):
        assert not re.search(r"(?<!\\)[\[\]<>`*!~]", shown) and "&lt;img" in shown
    assert "a \\| b" in build.as_text(hostile[-1])
    collected = json.loads(text)
    pdf = build.build(tmp_path, [collected | {"name": name} for name in hostile], tmp_path / "a.pdf", [plan])
    assert pdf.read_bytes().startswith(b"%PDF") and {path.name for path in tmp_path.iterdir()} == {"a.pdf"}


def committed_plans():
    return {path.parent.name: read_json(path) for path in (ROOT / "report" / "results").glob("*/summary.json")}


def test_readme_and_docs_show_the_committed_results():
    for name, parts in build.tables(committed_plans()).items():
        for table in parts.values():
            assert table in (ROOT / name).read_text(encoding="utf-8")


def test_the_committed_report_says_what_the_verdicts_say():
    pages = PdfReader(ROOT / "report" / "UNet_Model_Training_Report.pdf").pages
    pages = [re.sub(r"\s\d+$", "", page.extract_text()) for page in pages]  # without their numbers
    text = " ".join(" ".join(pages).split())
    assert 6 <= len(pages) <= 8 and all(len(page) > 300 for page in pages)
    headings = ["Abstract", "1 Question", "2 Data", "3 Method", "4 What", "5 The", "Limits", "References", "Appendix"]
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    for plan in committed_plans().values():
        for row in (row for row in plan["rows"].values() if "mean" in row and row["control"]):
            if row["title"].startswith((*TITLES.values(),)):
                assert build.sentence(row, plan["rows"]) in text


def test_the_confusion_matrix_follows_the_void_rule_of_the_training():
    results = {"trained_void": "background", "rules": {"background": {"classes": ["a", "b"]}}}
    figure = plots.confusion_matrix(results | {"confusion": [[3, 1], [0, 4], [6, 0]]})
    assert [text.get_text() for text in figure.axes[0].texts] == ["90", "10", "0", "100"]


def test_figures_are_drawn_for_many_classes(tmp_path):
    rng, class_set = np.random.default_rng(0), CLASS_SETS["cityscapes19"]
    names, painted = class_set.names, class_set.paint(rng.integers(0, 19, (8, 16)))
    figures = [plots.panels([[painted] * 2], ["a", "b"], class_set)]
    figures.append(plots.class_distribution(class_set, {"train": np.full(20, 1 / 20)}))
    ruled = {"trained_void": "ignore", "rules": {"ignore": {"classes": names}}}
    figures.append(plots.confusion_matrix(ruled | {"confusion": rng.integers(0, 9, (20, 19))}))
    figures.append(plots.iou_by_stage({"one": dict.fromkeys(names), "two": dict.fromkeys(names, 0.5)}))
    assert all(plots.save(f, tmp_path / f"{n}.png").stat().st_size > 2000 for n, f in enumerate(figures))
