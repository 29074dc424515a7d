"""`make html`: the executed notebooks as pages that need nothing else."""

import re
import subprocess
import sys

import nbformat
import pytest
import render
from browser import find_browser
from conftest import ROOT
from PIL import Image

NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    out = tmp_path_factory.mktemp("html")
    subprocess.run([sys.executable, ROOT / "notebooks" / "render.py", "--out", out], check=True, capture_output=True)
    return out


def test_there_is_a_page_for_each_notebook_that_loads_nothing(pages):
    assert sorted(page.stem for page in pages.iterdir()) == NAMES and len(NAMES) == 3
    for page in pages.iterdir():
        text = page.read_text(encoding="utf-8")
        assert "<script" not in text and "mIoU" in text and text.count("<img") >= 4
        assert "<h2" in text and "<p>" in text and not re.search(r"&lt;/?(p|h[1-6]|table|ul)\b", text)
        loaded = re.findall(r"<(?:img|link|iframe|source)\b[^>]*?\b(?:src|href)=[\"']([^\"']{,40})", text)
        assert loaded and all(source.startswith("data:") for source in loaded)


@pytest.mark.parametrize("name", NAMES)
def test_a_browser_shows_it(pages, name, tmp_path):
    browser = find_browser()
    # a browser that cannot reach anything: whatever the page still asked for would be missing
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9"]
    quiet += [f"--user-data-dir={tmp_path}"]
    picture, page = tmp_path / "page.png", (pages / f"{name}.html").as_uri()
    shot = [browser, *quiet, "--window-size=1200,9000", "--hide-scrollbars", f"--screenshot={picture}", page]
    subprocess.run(shot, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        assert image.size == (1200, 9000)
        colours = image.convert("RGB").reduce(20).getcolors(10**6)
    assert len(colours) > 500  # pictures and curves, not text alone


def test_a_hostile_notebook_runs_and_loads_nothing_and_a_broken_one_is_named(tmp_path, monkeypatch, capsys):
    html = "<img src=x onerror=alert(1)><script>alert(2)</script><a href='javascript:alert(3)'>x</a><iframe src='http://x'>"
    output = nbformat.v4.new_output("display_data", {"text/html": html, "application/javascript": "alert(4)"})
    cells = [nbformat.v4.new_markdown_cell(f"# {html}\n![remote](http://example.org/a.png)")]
    cells.append(nbformat.v4.new_code_cell("print(1)", outputs=[output]))
    hostile, broken = tmp_path / "hostile.ipynb", tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), hostile)
    broken.write_text("{")
    monkeypatch.setattr(sys, "argv", ["render.py", str(broken), str(hostile), "--out", str(tmp_path / "out")])
    assert render.main() == 1 and f"left out: {broken}" in capsys.readouterr().err
    page = (tmp_path / "out" / "hostile.html").read_text(encoding="utf-8")
    assert page.index("Content-Security-Policy") < page.index("<style")
    assert "default-src 'none'" in page and "script-src" not in page
    for part in ("<script", "<iframe", "javascript:alert"):
        assert part not in page.lower(), part
    assert not re.search(r"<[^>]*\bonerror", page)
