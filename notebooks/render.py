"""Render executed notebooks as pages that load nothing and run nothing, as `make html` starts it.

    python notebooks/render.py [--out runs/html] [NOTEBOOK ...]

Without notebooks: the three committed ones.
"""

import argparse
import re
import sys
from pathlib import Path

import bleach
from nbconvert import HTMLExporter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from unetseg.files import atomic_open, make_folder

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:; form-action 'none'; base-uri 'none'"
)
TAGS = {"a", "b", "blockquote", "br", "code", "div", "em", "h1", "h2", "h3", "h4", "hr", "i", "li", "ol", "p", "pre"}
TAGS |= {"span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"}
SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL | re.IGNORECASE)


def clean(html: str) -> str:
    """Markdown's own elements, and nothing that loads or runs; other tags become text."""
    return bleach.clean(html, tags=TAGS, attributes={"*": ["class", "id"], "a": ["href"]})


def render(notebook: Path) -> str:
    """The notebook as one HTML page: its content sanitised, nbconvert's own scripts removed, and a policy on top."""
    exporter = HTMLExporter(sanitize_html=True)
    exporter.register_filter("clean_html", clean)  # nbconvert's own shows headings and paragraphs as their tags
    page, _ = exporter.from_filename(str(notebook))
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    return SCRIPT.sub("", page).replace("<head>", f"<head>{policy}", 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="*", metavar="NOTEBOOK")
    parser.add_argument("--out", type=Path, default=Path("runs/html"))
    args, failed = parser.parse_args(), 0
    for notebook in args.notebooks or sorted(HERE.glob("*.ipynb")):
        try:
            page = render(notebook)
        except Exception as error:  # nbconvert has no common base class for broken notebooks
            print(f"left out: {notebook}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            failed = 1
            continue
        with atomic_open(make_folder(args.out) / f"{notebook.stem}.html") as file:
            file.write(page.encode())
        print(args.out / f"{notebook.stem}.html")
    return failed


if __name__ == "__main__":
    sys.exit(main())
