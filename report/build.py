"""Build the PDF report from results files; no score of ours in it is typed by hand.

python report/build.py                 report/results/ -> report/UNet_Model_Training_Report.pdf
python report/build.py --runs RUNS     first copy what a finished `make run` left in RUNS into report/results/
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import typst
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg import plots
from unetseg.augment import AUGMENTATIONS, Source, occlude
from unetseg.checkpoint import read_config, read_history
from unetseg.classes import CLASS_SETS, IGNORE_INDEX, stored
from unetseg.evaluation import comparable, headline, joined, read_results
from unetseg.files import make_folder, read_json, write_bytes, write_json
from unetseg.images import read_photo, read_png
from unetseg.inference import predict, trained_model
from unetseg.settings import FREE, TITLES
from unetseg.tools.scenes import draw_scene

RESULTS = ROOT / "report" / "results"
PICTURES = ("samples.jpg", "predictions.jpg")
FIRST = ("published", "scratch", "control", "weighted_ce_occlusion", "ce_dice_occlusion")
# further columns, and the names of their means
DETAILS = {"boundary IoU, 3 px": "boundary_iou_3px", "boundary F, 3 px": "boundary_f_3px"}
DETAILS |= {"small people": "iou_by_size person small", "large people": "iou_by_size person large"}
DETAILS |= {"ECE": "calibration_error", "mIoU on val": "val mIoU"}
RARE = {"recall of people": "recall person", "precision": "precision person"}
MARKS = {"better": " ▲", "worse": " ▼"}
MARKED = "▲ better, ▼ worse, after Holm's correction for the number of rows; one seed gets no verdict"
STREET = ((512, 256), (0, 0, 3))  # size and seed of the scene that shows the occluders


def collect(home: Path) -> dict:
    """Gather what the runs under `home` left on disk into home/results.json, and return it.

    Raises UserError when a stage has not been scored yet, or when the stages were not scored alike.
    """
    runs = {}
    for stage, title in TITLES.items():
        results, config = read_results(home / stage), read_config(home / stage)
        settings = {key: value for key, value in config["settings"].items() if key not in FREE}
        settings["epochs"] = config["cycles"][-1]
        runs[stage] = {"title": title, "scores": headline(results), "minutes": results["train_seconds"] / 60}
        runs[stage] |= {"results": {key: value for key, value in results.items() if key != "images"}}
        runs[stage] |= {"settings": settings, "history": read_history(home / stage)}
    first, config = runs["scratch"]["results"], read_config(home / "scratch")
    comparable([run["results"] for run in runs.values()])
    paths = sorted((home / "processed").glob("stats_*.json"))
    stats = {path.stem.removeprefix("stats_"): read_json(path) for path in paths}
    context = {key: first[key] for key in ("split", "split_note", "num_images", "size", "parameters")}
    context["remarks"] = list(dict.fromkeys(remark for run in runs.values() for remark in run["results"]["remarks"]))
    context |= {key: joined([run["results"] for run in runs.values()], key) for key in ("device", "torch", "commit")}
    context |= {"void": first["trained_void"], **stored(config).facts()}
    context |= {f"{name}_images": len(config["data"][name]["images"]) for name in ("train", "val")}
    context |= {f"{name}_note": config["data"][name]["note"] for name in ("train", "val")}
    context |= {key: config["settings"][key] for key in ("channels", "depth")}
    kept = ("num_images", "pixels")
    data = {split: {key: found[key] for key in kept} for split, found in stats.items() if "pixels" in found}
    collected = {"name": home.name, "context": context, "data": data, "runs": runs}
    write_json(home / "results.json", collected)
    return collected


def draw_charts(results: dict, folder: Path, number: int) -> None:
    """Write the charts of one data set: class distribution, curves, IoU by stage, confusion matrix."""
    class_set, runs = stored(results["context"]), results["runs"].values()
    totals = {split: [*data["pixels"]["full_resolution"].values()] for split, data in results["data"].items()}
    shares = {split: np.array(pixels) / sum(pixels) for split, pixels in totals.items()}
    charts = {"classes": plots.class_distribution(class_set, shares)}
    charts["curves"] = plots.training_curves({run["title"]: run["history"] for run in runs})
    charts["stages"] = plots.iou_by_stage({run["title"]: run["scores"] for run in runs})
    charts["confusion"] = plots.confusion_matrix(results["runs"]["ce_dice"]["results"])
    for chart, figure in charts.items():
        plots.save(figure, folder / f"{number}_{chart}.svg")


def draw_occluders(path: Path) -> None:
    """A drawn scene under each of the four occluders."""
    image, labels = (torch.from_numpy(array)[None].expand(4, *[-1] * array.ndim) for array in draw_scene(*STREET))
    images = image.permute(0, 3, 1, 2) / 255
    draws = {name: torch.full((4,), 0.5) for name in AUGMENTATIONS["occlude"].draws}
    draws |= {"apply": torch.zeros(4), "aim": torch.ones(4), "texture": (torch.arange(4) + 0.5) / 4}
    draws |= {"width": torch.ones(4), "height": torch.ones(4), "red": torch.full((4,), 0.8)}
    donors = draw_scene(STREET[0], (1, 0, 0))[0]
    donors = torch.from_numpy(donors).permute(2, 0, 1)[None].expand(4, -1, -1, -1) / 255
    source = Source(torch.zeros(4, 1, 4), torch.zeros(4, dtype=torch.long), lambda draw: donors)
    knobs = {"occlusion": 1.0, "aimed": 0.0, "occluder_size": 0.4, "occluded": "keep"}
    shown, _ = occlude(images, labels.long(), draws, source, **knobs)
    pictures = (shown * 255).byte().permute(0, 2, 3, 1).numpy()
    gap = np.full((pictures.shape[1], 12, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (picture, gap)][:-1]
    Image.fromarray(np.hstack(row)).save(path, quality=88)


def build(pictures: Path, results: list[dict], pdf: Path, plans: list[dict] = (), screen: list[dict] = ()) -> Path:
    """Write the report of one or more collected results to `pdf`.

    pictures  folder with samples.jpg and predictions.jpg of the first results; what is missing is left out
    plans     summaries of plans; screen the effects of ingredients that were tried
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, collected in enumerate(results):
            draw_charts(collected, folder, number)
        for plan in plans:
            plots.save(plots.verdicts(plan["rows"].values()), folder / f"{plan['name']}_verdicts.svg")
            plots.save(plots.lost_under_occluders(plan["rows"].values()), folder / f"{plan['name']}_occluded.svg")
        draw_occluders(folder / "occluders.jpg")
        found = [picture for picture in PICTURES if (pictures / picture).is_file()]
        for picture in found:
            shutil.copy(pictures / picture, folder)
        contents = {"results": results, "plans": [plan_contents(plan) for plan in plans], "pictures": found}
        write_json(folder / "report.json", contents | {"screen": list(screen)})
        for source in ("report.typ", "references.yml"):
            shutil.copy(ROOT / "report" / source, folder)
        make_folder(pdf.parent)
        typst.compile(folder / "report.typ", output=folder / "report.pdf", ignore_system_fonts=True)
        shutil.move(folder / "report.pdf", pdf)
    return pdf


def plan_contents(plan: dict) -> dict:
    """A plan as the report takes it: its table, and sentences that follow from its verdicts."""
    done = [row for row in plan["rows"].values() if "mean" in row]
    where = f"{plan['name']}, {len(done)} rows of {max(len(row['seeds']) for row in done)} seeds or fewer"
    best = [row for row in done if row["title"].startswith((*TITLES.values(),))]
    stages = " ".join(sentence(row, plan["rows"]) for row in best if row["control"] in plan["rows"])
    facts = {"name": plan["name"], "columns": PLAN_COLUMNS, "rows": plan_cells(plan), "note": plan_note(plan)}
    facts["folds"], columns = len(plan["folds"]), DETAILS | RARE
    facts["details"] = {"columns": list(columns), "rows": mean_cells(plan, columns.values())}
    facts["occluded"] = any(key.startswith("lost_under") for row in done for key in row["mean"])
    return facts | {"abstract": f"In the plan {where}: {stages}" if stages else ""}


def sentence(row: dict, rows: dict) -> str:
    """What the verdicts say of a row: better, worse, or not distinguishable, with the intervals."""
    scores = {"miou_against_control": "mIoU", "person_iou_against_control": "the IoU of people"}
    said = ", ".join(f"{what} is {phrase(row[key])}" for key, what in scores.items() if key in row)
    title = row["title"][0].upper() + row["title"][1:]
    return f"{title}, against {rows[row['control']]['title']}: {said}."


def phrase(verdict: dict) -> str:
    if "interval" not in verdict:
        return f"without a verdict ({verdict['reason']})"
    low, high = (100 * end for end in verdict["interval"])
    points = f"{100 * verdict['difference']:+.1f} points, {low:+.1f} to {high:+.1f}".replace("-", "−")
    return f"{verdict.get('verdict', 'without a verdict, for one seed')} ({points})"


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
        for key in ("scores mIoU", "scores person", "lost under occluders"):
            spread = f" ± {std[key]:.3f}" if key in std else ""
            cells.append(f"{mean[key]:.3f}{spread}" if key in mean else "–")
        for score in ("miou", "person_iou"):
            verdict = row.get(f"{score}_against_control", {})
            ends = verdict.get("interval")
            said = f"{100 * verdict['difference']:+.1f} ({100 * ends[0]:+.1f} to {100 * ends[1]:+.1f})" if ends else "–"
            cells.append(said + MARKS.get(verdict.get("verdict"), ""))
        rows[row["title"]] = [cell.replace("0.", ".") if cell[0] == "0" else cell for cell in cells]
        number = len(row["seeds"])
        both = row.get("miou_against_control", {"seeds": [number]})["seeds"][0]
        rows[row["title"]].append(f"{number}" + f" ({both} compared)" * (both < number))
    return rows


PLAN_COLUMNS = ["mIoU", "person", "lost under occluders", "points of mIoU", "of person", "seeds"]


def plan_note(summary: dict) -> str:
    """What the numbers of a plan are."""
    context, rows = summary["context"], {name: row for name, row in summary["rows"].items() if "mean" in row}
    against = {f"“{row['title']}”": row["control"] for row in rows.values() if row["control"] in rows}
    against = {title: f"“{rows[control]['title']}”" for title, control in against.items()}
    usual = max(against.values(), key=[*against.values()].count, default="")
    folds = f"means over {len(summary['folds'])} folds, " * (len(summary["folds"]) > 1)
    where = f"{summary['name']}: {folds}{context['size']}, {summary['precision']}, "
    where += f"{context['device']}, torch {context['torch']}."
    verdict = next((row["miou_against_control"] for row in rows.values() if "miou_against_control" in row), None)
    if verdict is None:
        return where
    others = "".join(f"; of {title}, to {control}" for title, control in against.items() if control != usual)
    points = f"Points are differences, of the scores pooled over all frames, to {usual}{others}."
    blocks = f"{verdict['blocks']} {'blocks of ten seconds' if verdict['names_tell_time'] else 'images'}"
    return f"{where} {points} In brackets 95 % intervals over {blocks}; {MARKED}."


def stage_table(summary: dict) -> str:
    """The stages and their control, for a first look."""
    kept = {name: row for name, row in summary["rows"].items() if name in FIRST and "mean" in row}
    cells = {row: [*found[:2], *found[3:]] for row, found in plan_cells(summary | {"rows": kept}).items()}
    where = f"{summary['name']}, {summary['context']['size']}, means over {len(summary['folds'])} folds"
    note = f"{where}. Points: to the row above (fine-tunings: to the control), under the same seeds; {MARKED}."
    return markdown([*PLAN_COLUMNS[:2], *PLAN_COLUMNS[3:]], cells, note)


def mean_cells(summary: dict, keys: Iterable[str]) -> dict[str, list[str]]:
    """The means of each row that has results."""
    rows = {row["title"]: [row["mean"].get(key) for key in keys] for row in summary["rows"].values() if "mean" in row}
    return {row: ["–" if x is None else f"{x:.3f}".replace("0.", ".") for x in found] for row, found in rows.items()}


def class_table(summary: dict) -> str:
    """IoU of each class, for all rows of a plan that have results."""
    means = next(row["mean"] for row in summary["rows"].values() if "mean" in row)
    keys = {key.removeprefix("scores "): key for key in means if key.startswith("scores ")}
    keys |= RARE | {"mIoU on val": "val mIoU"}
    note = "Means over folds and seeds; –: not scored. Val is not one of the folds."
    return markdown([*keys], mean_cells(summary, keys.values()), note)


def weighting_table(summary: dict) -> str:
    """Class weights: what they do to the recall and the precision of people."""
    shares, columns = mean_cells(summary, RARE.values()), [*PLAN_COLUMNS[:2], *RARE, *PLAN_COLUMNS[3:5]]
    cells = {row: [*found[:2], *shares[row], *found[3:5]] for row, found in plan_cells(summary).items()}
    return markdown(columns, cells, plan_note(summary))


def plan_table(summary: dict) -> str:
    """All rows of a plan that have results, as Markdown."""
    return markdown(PLAN_COLUMNS, plan_cells(summary), plan_note(summary))


# of each text: the marker, the plan, and what stands there
TEXTS = {"README.md": [("results", "camvid7", stage_table)], "docs/results.md": [("camvid7", "camvid7", plan_table)]}
TEXTS["docs/results.md"] += [("classes", "camvid7", class_table), ("weighting", "weighting", weighting_table)]
TEXTS["docs/results.md"] += [("drawn", "drawn", plan_table)]


def tables(plans: dict[str, dict]) -> dict[str, dict[str, str]]:
    """What stands between the markers of each text."""
    plans = as_text(plans)
    return {name: {marker: table(plans[plan]) for marker, plan, table in parts} for name, parts in TEXTS.items()}


def update_texts(plans: dict[str, dict]) -> None:
    """Write the tables of plans into the README and docs."""
    for name, parts in tables(plans).items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for marker, table in parts.items():
            begin, end = f"<!-- {marker}: written by make report -->\n", f"<!-- end of {marker} -->"
            before, rest = text.split(begin)
            text = f"{before}{begin}{table}\n{end}{rest.split(end)[1]}"
        write_bytes(ROOT / name, text.encode())


def adopt(home: Path) -> None:
    """Copy a finished run's results into report/results/: numbers always, pictures only of drawn scenes."""
    write_json(RESULTS / f"{home.name}.json", collect(home))
    if (home / "scenes").is_dir():
        shutil.copy(home / "pictures" / "samples.jpg", RESULTS)
        plots.save(draw_street(home), RESULTS / "predictions.jpg", dpi=200)


def draw_street(home: Path) -> plots.Figure:
    """A drawn val scene, its truth, and what each stage makes of it, at the scene's own size."""
    path = min((home / "scenes" / "leftImg8bit" / "val").rglob("*.png"))
    labels = Path(str(path).replace("leftImg8bit", "gtFine").replace("_gtFine.png", "_gtFine_labelIds.png"))
    image, class_set = read_photo(path), CLASS_SETS["cityscapes7"]
    mask = class_set.lookup[read_png(labels, "L")]
    pictures = {"a drawn street": image, "truth (black: not scored)": class_set.paint(mask)}
    for stage, title in TITLES.items():
        model, about = trained_model(home / stage)
        pred = predict(model, image, (about["width"], about["height"]))
        pictures[title] = class_set.paint(np.where(mask == IGNORE_INDEX, mask, pred))
    return plots.gallery(pictures, class_set)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    finished = "folders of finished `make run`s to copy from"
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help=finished)
    args = parser.parse_args()
    for home in args.runs:
        adopt(home)
    plans = {path.parent.name: read_json(path) for path in sorted(RESULTS.glob("*/summary.json"))}
    plans = {name: plan for name, plan in plans.items() if any("mean" in row for row in plan["rows"].values())}
    files = [read_json(path) for path in sorted(RESULTS.glob("*.json"))]
    results = sorted((file for file in files if "runs" in file), key=lambda file: not file["name"].startswith("drawn"))
    update_texts(plans)
    screen = list(read_json(RESULTS / "screen.json")["effects"].values())
    pdf = build(RESULTS, results, ROOT / "report" / "UNet_Model_Training_Report.pdf", list(plans.values()), screen)
    print(f"written to {pdf.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
