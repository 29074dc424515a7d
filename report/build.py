"""Build the PDF report from results files; no number in it is typed by hand.

python report/build.py                 report/results/ -> report/UNet_Model_Training_Report.pdf
python report/build.py --runs RUNS     first copy what a finished `make run` left in RUNS into report/results/
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import typst

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg import plots
from unetseg.checkpoint import read_config, read_history
from unetseg.classes import stored
from unetseg.evaluation import comparable, headline, joined, read_results
from unetseg.files import atomic_open, make_folder, read_json, write_json
from unetseg.settings import FREE, TITLES

RESULTS = ROOT / "report" / "results"
PICTURES = ("samples.jpg", "predictions.jpg")
# each text, and the name of the markers that its table stands between
TEXTS = {"README.md": "results", "docs/results.md": "camvid7"}
FIRST = ("published", "scratch", "control", "weighted_ce_occlusion", "ce_dice_occlusion", "weighted_ce_dice_occlusion")


def collect(home: Path, remarks: list[str] = ()) -> dict:
    """Gather what the runs under `home` left on disk, and remarks on them, into home/results.json, and return it.

    Raises UserError when a stage has not been scored yet, or when the stages were not scored alike.
    """
    runs = {}
    for stage, title in TITLES.items():
        results, config = read_results(home / stage), read_config(home / stage)
        runs[stage] = {
            "title": title,
            "scores": headline(results),
            "minutes": results["train_seconds"] / 60,
            "results": {key: value for key, value in results.items() if key != "images"},
            "settings": {key: value for key, value in config["settings"].items() if key not in FREE}
            | {"epochs": config["cycles"][-1]},
            "history": read_history(home / stage),
        }
    first, config = runs["scratch"]["results"], read_config(home / "scratch")
    comparable([run["results"] for run in runs.values()])
    paths = sorted((home / "processed").glob("stats_*.json"))
    stats = {path.stem.removeprefix("stats_"): read_json(path) for path in paths}
    context = {key: first[key] for key in ("split", "split_note", "remarks", "num_images", "size", "parameters")}
    context |= {
        key: joined({"sessions": [run["results"] for run in runs.values()]}, key)
        for key in ("device", "torch", "commit")
    }
    context["remarks"] = [*context["remarks"], *remarks]
    context |= {"void": first["trained_void"], **stored(config).facts()}
    context |= {f"{name}_images": len(config["data"][name]["images"]) for name in ("train", "val")}
    context |= {f"{name}_note": config["data"][name]["note"] for name in ("train", "val")}
    context |= {key: config["settings"][key] for key in ("channels", "depth")}
    data = {
        split: {key: found[key] for key in ("num_images", "pixels")}
        for split, found in stats.items()
        if "pixels" in found
    }
    collected = {"name": home.name, "context": context, "data": data, "runs": runs}
    write_json(home / "results.json", collected)
    return collected


def draw_charts(results: dict, folder: Path, number: int) -> None:
    """Write the report's charts of one data set: class distribution, curves, IoU by stage, confusion matrix."""
    class_set = stored(results["context"])
    shares = {
        split: np.array(list(data["pixels"]["full_resolution"].values())) for split, data in results["data"].items()
    }
    shares = {split: pixels / pixels.sum() for split, pixels in shares.items()}
    charts = {"classes": plots.class_distribution(class_set, shares)}
    for stage, run in results["runs"].items():
        charts[f"curves_{stage}"] = plots.training_curves(run["history"], run["title"])
    rows = {
        run["title"]: {key: run["scores"][key] for key in (*class_set.names, "mIoU")}
        for run in results["runs"].values()
    }
    charts["stages"] = plots.iou_by_stage(rows)
    last = np.array(results["runs"]["ce_dice"]["results"]["confusion"])[:-1]
    charts["confusion"] = plots.confusion_matrix(last, class_set.names)
    for chart, figure in charts.items():
        plots.save(figure, folder / f"{number}_{chart}.svg")


def build(pictures: Path, results: list[dict], pdf: Path, plans: list[dict] = ()) -> Path:
    """Write the report of one or more collected results to `pdf`.

    pictures  folder with samples.jpg and predictions.jpg of the first results; what is missing is left out
    plans     summaries of plans
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, collected in enumerate(results):
            draw_charts(collected, folder, number)
        found = [picture for picture in PICTURES if (pictures / picture).is_file()]
        for picture in found:
            shutil.copy(pictures / picture, folder)
        tables = [{"columns": PLAN_COLUMNS, "rows": plan_cells(plan), "note": plan_note(plan)} for plan in plans]
        contents = {"results": results, "plans": tables, "pictures": found}
        write_json(folder / "report.json", contents)
        shutil.copy(ROOT / "report" / "report.typ", folder)
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        make_folder(pdf.parent)
        typst.compile(folder / "report.typ", output=folder / "report.pdf", font_paths=[fonts], ignore_system_fonts=True)
        shutil.move(folder / "report.pdf", pdf)
    return pdf


def as_text(value: object) -> object:
    """The same JSON, whose texts Markdown shows as they are: never as markup, an element, or a marker of ours."""
    if isinstance(value, dict):
        return {as_text(key): as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_text(item) for item in value]
    if not isinstance(value, str):
        return value
    escaped = re.sub(r"([\\`*\[\]|!~])", r"\\\1", " ".join(value.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown(names: list[str], rows: dict[str, list[str]], note: str) -> str:
    """A Markdown table with a note below."""
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()]
    return "\n".join([*lines, "", note])


def plan_cells(summary: dict) -> dict[str, list[str]]:
    """Of each row of a plan that has results: mIoU, IoU of people, what is lost under occluders, and the difference to
    its control in points of mIoU and of people, with 95 % intervals; and the number of seeds."""
    rows = {}
    for row in (row for row in summary["rows"].values() if "mean" in row):
        cells, mean, std = [], row["mean"], row["std"]
        for key in ("scores mIoU", "scores person"):
            spread = f" ± {std[key]:.3f}" if key in std else ""
            cells.append(f"{mean[key]:.3f}{spread}" if key in mean else "–")
        lost = [value for key, value in mean.items() if key.startswith("lost_under_occluders")]
        cells.append(f"{np.mean(lost):.3f}")
        for score in ("miou", "person_iou"):
            verdict = row.get(f"{score}_against_control", {})
            ends = verdict.get("interval")
            said = f"{100 * verdict['difference']:+.1f} ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})" if ends else "–"
            cells.append(said)
        rows[row["title"]] = [cell.replace("0.", ".") if cell[0] == "0" else cell for cell in cells]
        rows[row["title"]].append(str(len(row["seeds"])))
    return rows


PLAN_COLUMNS = ["mIoU", "person", "lost under occluders", "points of mIoU", "of person", "seeds"]


def plan_note(summary: dict) -> str:
    """What the numbers of a plan are."""
    context, rows = summary["context"], summary["rows"]
    against = {row["title"]: rows[row["control"]]["title"] for row in rows.values() if row["control"] in rows}
    usual = max(against.values(), key=[*against.values()].count, default="")
    where = f"{summary['name']}: means over {len(summary['folds'])} folds, {context['size']}, {summary['precision']}, "
    where += f"{context['device']}, torch {context['torch']}."
    if not usual:
        return where
    others = "".join(f"; of {title}, to {control}" for title, control in against.items() if control != usual)
    return (
        f"{where} Points are differences, of the scores pooled over the frames of all folds, to {usual}{others}. In "
        "brackets 95 % intervals over blocks of ten seconds."
    )


def plan_table(summary: dict, names: tuple[str, ...] | None = None) -> str:
    """A plan, or some rows of it, as Markdown."""
    kept = {name: row for name, row in summary["rows"].items() if names is None or name in names}
    return markdown(PLAN_COLUMNS, plan_cells({**summary, "rows": kept}), plan_note({**summary, "rows": kept}))


def tables(summary: dict) -> dict[str, str]:
    """What stands between the markers of each text: the README shows the stages, docs all rows."""
    summary = as_text(summary)
    return {"README.md": plan_table(summary, FIRST), "docs/results.md": plan_table(summary)}


def update_texts(summary: dict) -> None:
    """Write the tables of a plan into the README and docs."""
    for name, table in tables(summary).items():
        begin, end = f"<!-- {TEXTS[name]}: written by make report -->\n", f"<!-- end of {TEXTS[name]} -->"
        before, rest = (ROOT / name).read_text(encoding="utf-8").split(begin)
        with atomic_open(ROOT / name) as file:
            file.write(f"{before}{begin}{table}\n{end}{rest.split(end)[1]}".encode())


def adopt(home: Path) -> None:
    """Copy a finished run's results into report/results/: numbers always, pictures only of drawn scenes."""
    write_json(RESULTS / f"{home.name}.json", collect(home))
    if home.name.startswith("drawn"):
        for picture in PICTURES:
            shutil.copy(home / "pictures" / picture, RESULTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    finished = "folders of finished `make run`s to copy from"
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help=finished)
    args = parser.parse_args()
    for home in args.runs:
        adopt(home)
    files = [read_json(path) for path in sorted([*RESULTS.glob("*.json"), *RESULTS.glob("*/summary.json")])]
    plans = [file for file in files if "rows" in file]
    results = sorted((file for file in files if "runs" in file), key=lambda file: not file["name"].startswith("drawn"))
    update_texts(next(plan for plan in plans if plan["name"] == "camvid7"))
    pdf = build(RESULTS, results, ROOT / "report" / "UNet_Model_Training_Report.pdf", plans)
    print(f"written to {pdf.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
