"""The notebooks as committed, and as they run."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import execute
import nbformat
import pytest
import run_all
from conftest import ROOT, wait_for

from unetseg import plots
from unetseg.settings import KNOBS
from unetseg.tools import kaggle, layouts

pytestmark = pytest.mark.usefixtures("alone")
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
    notebooks = [nbformat.read(ROOT / "notebooks" / name, as_version=4) for name in execute.NOTEBOOKS.values()]
    assert len({code_cells(notebook)[0].source for notebook in notebooks}) == 1


def test_the_main_job_from_raw_scenes_to_the_report(raw, tmp_path, monkeypatch, capfd):
    """What `make run DATA=... QUICK=1` does, at a tiny size: preprocessing, the three notebooks, report, summary."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(layouts.DataSet, "quick_size", lambda self: (64, 32))
    monkeypatch.setattr(kaggle, "QUICK_CHANNELS", 4)
    monkeypatch.setattr(kaggle, "QUICK_IMAGES", dict.fromkeys(execute.NOTEBOOKS, 1))
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--data", str(raw), "--out", str(tmp_path), "--quick"])
    assert run_all.main() == 0
    home = run_all.home_of(raw, tmp_path, True)
    for stage, name in execute.NOTEBOOKS.items():
        done = nbformat.read(home / "notebooks" / name, as_version=4)
        assert not [o for cell in code_cells(done) for o in cell.outputs if o.output_type == "error"]
        assert "**Answer.** mIoU" in done.cells[0].source and "too few to read anything" in done.cells[0].source
        config = json.loads((home / stage / "config.json").read_text())
        assert (config["cycles"], config["settings"]["stage"], config["width"]) == ([2], stage, 64)
    assert {path.name for path in (home / "pictures").iterdir()} >= {"samples.jpg", "predictions.jpg", "stages.png"}
    assert (home / "UNet_Model_Training_Report.pdf").read_bytes().startswith(b"%PDF")
    said = capfd.readouterr().out
    assert all(word in said for word in ("ce_dice", "mIoU", "W&B run folder", "executed notebooks", "report  "))


def test_settings_are_changed_in_the_cell_that_shows_them(committed):
    execute.change_settings(committed, {"epochs": 7, "out": "else where"})
    source = next(cell.source for cell in committed.cells if "parameters" in cell.metadata.get("tags", []))
    assert "    epochs=7,  # passes" in source and '    out="else where",  # run folder' in source
    with pytest.raises(ValueError, match="expected a setting nosuch"):
        execute.change_settings(committed, {"nosuch": 1})


def test_the_settings_cell_says_what_the_declaration_says(committed):
    source = next(cell.source for cell in committed.cells if "parameters" in cell.metadata.get("tags", []))
    lines = [line.strip() for line in source.splitlines() if line.startswith("    ")]
    assert len(lines) > 10
    for line in lines:
        name, text = line.split("=")[0], line.split(",  # ")[1]
        assert text == KNOBS[name].metadata["help"], name


def test_a_hundred_epochs_leave_a_line_each_and_one_figure(tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *picture, display_id: shown.append(picture) or Handle())
    live = plots.LiveCurves(tmp_path / "curves_scratch.png", every=1000)
    row = {"train_loss": 1, "val_loss": 1.0, "seconds": 1}
    history = [{"epoch": epoch, "val_miou": epoch / 100, **row} for epoch in range(1, 101)]
    for done in range(1, 101):
        live(history[:done])
    live.draw(history)
    live.draw([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 100 and lines[99].startswith("epoch 100  loss 1.000") and len(shown) == 1
    assert (tmp_path / "curves_scratch.png").is_file()


class Handle:
    def update(self, picture):
        """As IPython's."""


def test_each_data_set_has_a_folder_of_its_own(tmp_path):
    (tmp_path / "a" / "cam").mkdir(parents=True)
    (tmp_path / "b" / "cam").mkdir(parents=True)
    homes = {run_all.home_of(data, tmp_path, False) for data in (tmp_path / "a" / "cam", tmp_path / "b" / "cam")}
    homes |= {run_all.home_of(tmp_path / "drawn", tmp_path, False), run_all.home_of(None, tmp_path, False)}
    homes |= {run_all.home_of(Path("/x/$(touch owned)\n/"), tmp_path, True)}
    assert len(homes) == 5 and all(home.parent == tmp_path and home.name.isprintable() for home in homes)


@pytest.mark.parametrize("options", [["--data", ""], ["--out", ""], ["--data", "/nowhere"]])
def test_a_wrong_path_is_one_line(options, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_all.py", *options])
    if options[1]:
        assert run_all.main() == 1
    else:
        with pytest.raises(SystemExit):
            run_all.main()
    assert ("error: " in (said := capsys.readouterr().err)) and "Traceback" not in said


def test_an_interrupt_reaches_the_notebook_which_saves(processed, tmp_path):
    """As in `make run`: the first Ctrl-C is obeyed, without a traceback of the notebook client."""
    script = tmp_path / "script.py"
    settings = {"data": str(processed), "out": str(tmp_path / "scratch"), "channels": 4, "epochs": 5000}
    script.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT / "notebooks")!r}]
import execute, pathlib
source = pathlib.Path({str(ROOT / "notebooks")!r}, execute.NOTEBOOKS["scratch"])
try:
    execute.execute(source, pathlib.Path({str(tmp_path / "done.ipynb")!r}), {settings!r})
except KeyboardInterrupt:
    sys.exit(130)
""")
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "scratch" / "history.csv", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert (tmp_path / "scratch" / "state.pt").exists() and (tmp_path / "done.ipynb").exists()
