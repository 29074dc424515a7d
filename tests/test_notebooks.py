"""The notebooks as committed, and as they run."""

import json
import sys
from pathlib import Path

import execute
import nbformat
import pytest
import run_all

from unetseg.stages import Settings

ROOT = Path(__file__).resolve().parents[1]
HEADINGS = ["Question and answer", "Settings", "Data", "Model and loss", "Training", "Results", "What this shows"]


@pytest.fixture(params=execute.NOTEBOOKS.items(), ids=lambda item: item[0])
def committed(request):
    return nbformat.read(ROOT / "notebooks" / request.param[1], as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_headings_are_those_of_a_short_paper(committed):
    lines = [line for cell in committed.cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    assert [line[3:] for line in lines if line.startswith("## ")] == HEADINGS


def test_no_logic_and_short_cells(committed):
    for cell in code_cells(committed):
        lines = cell.source.splitlines()
        assert len(lines) <= 20 and not any(line.lstrip().startswith(("def ", "class ")) for line in lines)


def test_committed_as_executed_in_one_go(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    assert "**Answer.** mIoU" in committed.cells[0].source
    assert len(nbformat.writes(committed)) < 500_000


def test_the_first_cell_is_the_same_in_all_three():
    cells = [
        code_cells(nbformat.read(ROOT / "notebooks" / name, as_version=4))[0].source
        for name in execute.NOTEBOOKS.values()
    ]
    assert len(set(cells)) == 1


def test_the_main_job_from_raw_scenes_to_the_report(raw, tmp_path, monkeypatch, capfd):
    """What `make run DATA=... QUICK=1` does, at a tiny size: preprocessing, the three notebooks, report, summary."""
    monkeypatch.setattr(run_all, "QUICK_SIZE", {"cityscapes": "64x32"})
    monkeypatch.setattr(run_all, "QUICK_CHANNELS", 4)
    monkeypatch.setattr(run_all, "QUICK_IMAGES", dict.fromkeys(execute.NOTEBOOKS, 1))
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--data", str(raw), "--out", str(tmp_path), "--quick"])
    assert run_all.main() == 0
    home = tmp_path / f"{raw.name}-quick"
    for stage, name in execute.NOTEBOOKS.items():
        done = nbformat.read(home / "notebooks" / name, as_version=4)
        assert not [o for cell in code_cells(done) for o in cell.outputs if o.output_type == "error"]
        assert "**Answer.** mIoU" in done.cells[0].source
        config = json.loads((home / stage / "config.json").read_text())
        assert (config["settings"]["epochs"], config["stage"], config["width"]) == (2, stage, 64)
    assert {path.name for path in (home / "pictures").iterdir()} >= {"samples.jpg", "predictions.jpg", "stages.png"}
    assert (home / "UNet_Model_Training_Report.pdf").read_bytes().startswith(b"%PDF")
    said = capfd.readouterr().out
    assert all(word in said for word in ("ce_dice", "mIoU", "W&B run folder", "executed notebooks", "report  "))


def test_settings_are_changed_in_the_cell_that_shows_them(committed):
    execute.change_settings(committed, {"epochs": 7, "out": "else where"})
    source = next(cell.source for cell in committed.cells if "parameters" in cell.metadata.get("tags", []))
    assert "    epochs=7,  # passes" in source and '    out="else where",  # the run folder' in source
    with pytest.raises(ValueError, match="expected a setting nosuch"):
        execute.change_settings(committed, {"nosuch": 1})


def test_every_setting_in_the_notebooks_exists(committed):
    source = next(cell.source for cell in committed.cells if "parameters" in cell.metadata.get("tags", []))
    names = [line.split("=")[0].strip() for line in source.splitlines() if line.startswith("    ")]
    assert names and set(names) <= set(Settings.__dataclass_fields__)
