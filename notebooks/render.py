"""Render executed notebooks as pages that need nothing else, as `make html` starts it: no W&B, no Jupyter, no network.

    python notebooks/render.py [--out runs/html] [NOTEBOOK ...]

Without notebooks: the three committed ones.
"""

import argparse
import re
import sys
from pathlib import Path

from nbconvert import HTMLExporter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from unetseg.files import atomic_open

SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)


def render(notebook: Path) -> str:
    """The notebook as one HTML page that loads nothing and runs nothing.

    nbconvert's scripts, for formulas, diagrams and widgets, would come over the network; these notebooks have none.
    """
    page, _ = HTMLExporter().from_filename(str(notebook))
    return SCRIPT.sub("", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="*", metavar="NOTEBOOK")
    parser.add_argument("--out", type=Path, default=Path("runs/html"))
    args = parser.parse_args()
    for notebook in args.notebooks or sorted(HERE.glob("*.ipynb")):
        page = args.out / f"{notebook.stem}.html"
        with atomic_open(page) as file:
            file.write(render(notebook).encode())
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
