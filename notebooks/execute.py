"""Run a notebook from top to bottom with other settings, and keep what it showed but not its progress bars."""

import asyncio
import atexit
import json
import re
import sys
import threading
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg.checkpoint import read_config
from unetseg.evaluation import headline, read_results
from unetseg.files import make_folder, read_json
from unetseg.tools.plan import Job, read_plan, recipe_of, whole

NOTEBOOKS = {
    "scratch": "Model_Training_UNet_From_scratch.ipynb",
    "weighted_ce": "Fine_tuning_with_Weighted_CE_and_Augmentation.ipynb",
    "ce_dice": "Fine_tuning_with_combined_CE_and_DICE_Loss.ipynb",
}


SPREAD = {"mIoU": "scores mIoU", "person": "scores person"}


class Client(NotebookClient):
    """Runs a notebook; what it prints goes to the terminal, too, and warnings and progress bars only there."""

    def process_message(self, msg, cell, cell_index):
        if msg["header"]["msg_type"] == "stream":
            sys.stderr.write(msg["content"]["text"])
            sys.stderr.flush()
            if msg["content"]["name"] == "stderr":
                return None
        return super().process_message(msg, cell, cell_index)


def change_settings(notebook: nbformat.NotebookNode, settings: dict) -> None:
    """Replace values in the `name=value,  # why` lines of the cell tagged "parameters"."""
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in settings.items():
        line = re.compile(rf"^(    {name}=).*?(,(?:  #.*)?)$", re.MULTILINE)
        if not line.search(cell.source):
            raise ValueError(f"expected a setting {name} in the parameters cell, found none")
        shown = json.dumps(value) if isinstance(value, str) else repr(value)
        cell.source = line.sub(lambda match: f"{match[1]}{shown}{match[2]}", cell.source)  # noqa: B023


def fill_answer(notebook: nbformat.NotebookNode, run: Path) -> None:
    """Write the run's scores, with their context, into the line that begins with "**Answer.**"."""
    results = read_results(run)
    score, (width, height) = headline(results), results["size"]
    person = f", person IoU **{score['person']:.3f}**" if score.get("person") is not None else ""
    answer = (
        f"**Answer.** mIoU **{score['mIoU']:.3f}**{person} on {results['split_note']} (split `{results['split']}`), "
        f"{width}x{height}, void rule `{results['trained_void']}`, seed {results['seed']}; {seeds_of(run, results)}. "
        f"Trained in {results['train_seconds'] / 60:.1f} minutes on {results['device']}, torch {results['torch']}."
    ) + "".join(f" {remark[0].upper()}{remark[1:]}." for remark in results["remarks"])
    cell = next(cell for cell in notebook.cells if "**Answer.**" in cell.source)
    cell.source = re.sub(r"^\*\*Answer\.\*\*.*$", lambda match: answer, cell.source, flags=re.MULTILINE)


def seeds_of(run: Path, results: dict) -> str:
    """How far seeds differ: measured for the quick schedule on drawn scenes, by report/plans/drawn.toml."""
    plan, config = read_plan(ROOT / "report" / "plans" / "drawn.toml"), read_config(run)
    done = read_json(ROOT / "report" / "results" / "drawn" / "summary.json")
    there, planned = whole(config["settings"]), recipe_of(plan, Job(results["stage"], 0, None))
    like = all(there[key] == planned[key] for key in planned.keys() - {"init", "seed", "precision"})
    like &= done["context"]["size"] == "{}x{}".format(*results["size"])
    if not like or not all("/drawn_" in image for image in results["images"]):
        return "one seed, so a difference of a point or two to another run says nothing"
    row = done["rows"][results["stage"]]
    parts = [f"{name} {row['mean'][key]:.3f} ± {row['std'][key]:.3f}" for name, key in SPREAD.items()]
    return f"over {len(row['seeds'])} seeds, in {plan['precision']}, {', '.join(parts)}"


def publish(done: Path, target: Path, stage: str) -> None:
    """Write an executed notebook to `target`, with the paths that suit any place instead of this execution's."""
    notebook = nbformat.read(done, as_version=4)
    paths = {"data": "auto", "out": f"runs/{stage}", "epochs": None}
    change_settings(notebook, paths | ({"channels": None} if stage == "scratch" else {"init": "runs/scratch"}))
    nbformat.write(notebook, target)


def execute(source: Path, target: Path, settings: dict) -> None:
    """Execute `source` from the repository's root with changed settings and write it to `target`.

    Raises nbclient.exceptions.CellExecutionError when a cell fails; the notebook up to there is still written. Ctrl-C
    or SIGTERM interrupts the running cell, in which training then saves its state, and is raised afterwards.
    """
    notebook = nbformat.read(source, as_version=4)
    change_settings(notebook, settings)
    options = {"timeout": None, "record_timing": False, "coalesce_streams": True}
    options["extra_arguments"] = ["--log-level=CRITICAL"]  # not what the kernel says of its sockets
    client = Client(notebook, resources={"metadata": {"path": ROOT}}, **options)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            client.execute()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)  # the client would take over the signals of the main thread
    thread.start()
    try:
        thread.join()
    except (KeyboardInterrupt, SystemExit):
        if client.km and client.km.has_kernel:
            asyncio.run(client.km.interrupt_kernel())
        thread.join()
        raise
    finally:
        atexit.unregister(client._cleanup_kernel)  # the kernel has gone by now
        notebook.metadata.pop("widgets", None)
        make_folder(target.parent)
        nbformat.write(notebook, target)
    if errors:
        raise errors[0]
    fill_answer(notebook, ROOT / settings["out"])
    nbformat.write(notebook, target)
