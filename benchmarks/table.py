"""Write the tables of speeds, all in docs/speed.md and some in the README, from benchmarks/results/.

python benchmarks/table.py
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg.files import atomic_open, read_json

# what a user chooses by, by what it is against
CHOICES = ("straightforward script", "loop most people run", "the published recipe")
TEXTS = {"README.md": ("choices", CHOICES), "docs/speed.md": ("speed", ("",))}  # markers, what is shown
NAMES = ("preprocessing", "training", "predict", "quality")


def markdown(files: list[dict], against: tuple[str, ...] = ("",)) -> str:
    """A line per comparison with what has one of these texts in its name, and below on what machine they were made."""
    lines = ["| what | images/s | against | times as fast (lowest-highest) |", "|---|---|---|---|"]
    for file in files:
        for row in (row for row in file["rows"] if any(text in row["against"] for text in against)):
            ratios = row["ratios"]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            speed = row["notes"].get("images_per_second", "–")
            lines.append(f"| {row['what']} | {speed} | {row['against']} | {spread} |")
    about = ("device", "cores", "torch", "opencv", "commit")
    places = {", ".join(f"{key} {file[key]}" for key in about) for file in files}
    note = "Medians of three interleaved rounds. "
    return "\n".join([*lines, "", note + "; ".join(sorted(places)) + "."])


def committed() -> list[dict]:
    """The results files there are, in the order of the table."""
    paths = [ROOT / "benchmarks" / "results" / f"{name}.json" for name in NAMES]
    return [read_json(path) for path in paths if path.is_file()]


def main() -> None:
    for name, (marker, against) in TEXTS.items():
        begin, end = f"<!-- {marker}: written by make bench -->\n", f"<!-- end of {marker} -->"
        before, rest = (ROOT / name).read_text(encoding="utf-8").split(begin)
        table = markdown(committed(), against)
        with atomic_open(ROOT / name) as file:
            file.write(f"{before}{begin}{table}\n{end}{rest.split(end)[1]}".encode())
    print(table)


if __name__ == "__main__":
    main()
