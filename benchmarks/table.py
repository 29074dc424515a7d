"""Write the tables of speeds, all in docs/speed.md and some in the README, from benchmarks/results/, and the record.

python benchmarks/table.py
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg.files import atomic_open, read_json

# what a user chooses by, by what it is against
CHOICES = ("straightforward script", "loop most people run")
TEXTS = {"README.md": ("choices", CHOICES), "docs/speed.md": ("speed", ("",))}  # markers, what is shown
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("preprocessing", "training", "predict")
ABOUT = ("device", "cores", "torch", "opencv", "commit")


def markdown(files: list[dict], against: tuple[str, ...] = ("",)) -> str:
    """A line per comparison with what has one of these texts in its name, and below on what machine they were made."""
    lines = ["| what | images/s | against | times as fast (lowest-highest) |", "|---|---|---|---|"]
    for file in files:
        for row in (row for row in file["rows"] if any(text in row["against"] for text in against)):
            ratios = row["ratios"]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            lines.append(f"| {row['what']} | {row['notes']['images_per_second']} | {row['against']} | {spread} |")
    places = {", ".join(f"{key} {file[key]}" for key in ABOUT) for file in files}
    note = "Medians of three interleaved rounds. "
    return "\n".join([*lines, "", note + "; ".join(sorted(places)) + "."])


def committed() -> list[dict]:
    """The results files there are, in the order of the table."""
    paths = [RESULTS / f"{name}.json" for name in NAMES]
    return [read_json(path) for path in paths if path.is_file()]


def record(file: dict) -> str:
    """Seconds and score of both sides of quality.py."""
    row = file["rows"][0]
    lines = ["| | seconds a fold | mIoU, mean of four folds |", "|---|---|---|"]
    for side, what, score in (("ours", row["what"], "reached"), ("theirs", row["against"], "target")):
        lines.append(f"| {what} | {statistics.median(row['seconds'][side]):.0f} | {row['notes'][score]:.3f} |")
    ratios = f"{statistics.median(row['ratios']):.0f} times as fast ({min(row['ratios']):.0f}-{max(row['ratios']):.0f})"
    return "\n".join([*lines, "", f"{ratios}; " + ", ".join(f"{key} {file[key]}" for key in ABOUT) + "."])


def main() -> None:
    for name, (marker, against) in TEXTS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        found = {marker: markdown(committed(), against), "record": record(read_json(RESULTS / "quality.json"))}
        for part, table in found.items():
            begin, end = f"<!-- {part}: written by make bench -->\n", f"<!-- end of {part} -->"
            before, rest = text.split(begin)
            text = f"{before}{begin}{table}\n{end}{rest.split(end)[1]}"
        with atomic_open(ROOT / name) as file:
            file.write(text.encode())
        print("\n\n".join(found.values()))


if __name__ == "__main__":
    main()
