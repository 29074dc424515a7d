"""Every command that the pages of docs/ print runs, in their order, on tiny data; and every link leads somewhere."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, command
from PIL import Image

from unetseg import __version__

PAGES = ("training", "evaluation", "show", "wandb", "gpus", "data", "plans")  # the later use what the first makes
BLOCK = re.compile(r"```(bash|python|toml)\n(.*?)```", re.DOTALL)
TINY = {"--epochs": "1", "--channels": "4", "--depth": "2"}
SMALLER = {  # what makes the printed lines quick
    '"runs/a/script")': '"runs/a/script", epochs=1, channels=4, depth=2)',
    "seeds = [0, 1, 2]": "seeds = [0]",
    "folds = [0, 1, 2, 3]": "folds = [0]",
    "channels = 16\ndepth = 4": "channels = 4\ndepth = 2\nepochs = 1",
    "epochs = 15": "epochs = 1",
    "--train 64 --val 40 --size 1024x512": "--train 2 --val 2 --size 128x64",
    "weights/unet-camvid7.safetensors weights/unet-drawn.safetensors --out": "weights/unet-drawn.safetensors --out",
}
READ = [*sorted(ROOT.glob("docs/*.md")), *(ROOT / folder / "README.md" for folder in (".", "kaggle", "weights"))]


def tiny(line):
    """The arguments of a printed command, with a short schedule where it names none."""
    parts = line.split(" #")[0].split()
    if "train" in parts:
        given = {flag: value for flag, value in TINY.items() if "--init" not in parts or flag == "--epochs"}
        parts += [part for flag, value in given.items() if flag not in parts for part in (flag, value)]
    if "preprocess" in parts and "--size" not in parts:
        parts += ["--size", "64x32"]
    return parts


def test_the_pages_do_what_they_print(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert command("scenes", "raw", "--train", 12, "--val", 4, "--size", "128x64") == 0
    rng = np.random.default_rng(0)
    for folder in ("photos", "my_data/images", "my_data/masks"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(rng.integers(0, 255, (90, 160, 3), np.uint8)).save("photos/street.jpg")
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(f"my_data/images/{number}.png")
        Image.fromarray(np.eye(64, dtype=np.uint8)).save(f"my_data/masks/{number}.png")
    os.symlink(ROOT / "weights", "weights")
    ran = 0
    for page in PAGES:
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        for language, block in BLOCK.findall(text):
            for old, new in SMALLER.items():
                block = block.replace(old, new)
            if language == "toml":
                (tmp_path / "mine.toml").write_text(block)
            elif language == "python":
                subprocess.run([sys.executable, "-c", block], check=True)
            for line in block.splitlines() if language == "bash" else []:
                program, *arguments = tiny(line)
                if program == "torchrun":
                    subprocess.run([sys.executable, "-m", "torch.distributed.run", *arguments], check=True)
                else:
                    assert command(*arguments[2:]) == 0, line
                ran += 1
    assert ran > 20


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", READ, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_link_leads_somewhere(path):
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text())):
        found = path.parent / target if target else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), anchor


def test_the_citation_is_of_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130 and all(page.name in text for page in ROOT.glob("docs/*.md"))
