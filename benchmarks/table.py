"""Write the README's table of speeds from benchmarks/results/.

python benchmarks/table.py
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg.files import atomic_open, read_json

MARKERS = ("<!-- speed: written by make bench -->", "<!-- end of speed -->")
NAMES = ("preprocessing", "training", "predict")


def markdown(files: list[dict]) -> str:
    """A line per comparison, and below what machine and versions they were taken on."""
    lines = ["| what | images/s | against | times as fast (lowest-highest) |", "|---|---|---|---|"]
    for file in files:
        for row in file["rows"]:
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
    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    with atomic_open(path) as file:
        file.write(f"{before}{MARKERS[0]}\n{markdown(committed())}\n{MARKERS[1]}{after}".encode())
    print(markdown(committed()))


if __name__ == "__main__":
    main()
