"""Write the README's table of speeds from benchmarks/results/.

python benchmarks/table.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from unetseg.files import atomic_open, read_json

MARKERS = ("<!-- speed: written by make bench -->", "<!-- end of speed -->")
NAMES = ("preprocessing", "training", "training_large", "inference", "inference_large", "start")


def markdown(files: list[dict]) -> str:
    """A line per comparison, and below what machine and versions they were taken on."""
    lines = ["| what | against | ratio (lowest-highest) | target |", "|---|---|---|---|"]
    for file in files:
        for row in file["rows"]:
            spread = f"{row['median']:.2f}"
            if len(row["ratios"]) > 1:
                spread += f" ({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
            missed = "" if row["met"] in (True, None) else ", **missed**"
            lines.append(f"| {row['what']} | {row['against']} | {spread} | {row['target'] or '–'}{missed} |")
    about = ("device", "cores", "torch", "opencv", "commit")
    places = {", ".join(f"{key} {file[key]}" for key in about) for file in files}
    note = (
        "Ratios of times, medians of five interleaved rounds each; with ≥, baseline / ours, with ≤, ours / baseline. "
    )
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
