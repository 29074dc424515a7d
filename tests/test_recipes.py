"""docs/changing-things.md, each recipe followed exactly as it is printed, in a copy of the library."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from unetseg.tools.class_files import read_class_file

TEXT = (ROOT / "docs" / "changing-things.md").read_text(encoding="utf-8")
RECIPES = {part.splitlines()[0]: part for part in TEXT.split("\n## ")[1:]}
STEP = re.compile(r"(?:(At the end of|As) `([^`]+)`[^\n]*\n\n)?```(python|toml|bash)\n(.*?)```", re.DOTALL)
EXPECTED = {
    "A loss": ("runs/focal/history.csv", "train_loss"),
    "A network": ("runs/smp/results_test.json", '"parameters": 14'),
    "An augmentation": ("runs/blur/config.json", '"blur"'),
    "A data set": ("runs/roads/config.json", '"road"'),
    "A metric": ("runs/metric/results_test.json", '"fwiou"'),
    "TensorBoard": ("runs/logged/history.csv", "train_loss"),
}
assert len(RECIPES) == len(EXPECTED) == 6


def draw_pairs(root, images, masks, split):
    rng = np.random.default_rng(len(split))
    for number in range(3):
        arrays = {images: rng.integers(0, 255, (64, 64, 3), np.uint8), masks: np.eye(64, dtype=np.uint8)}
        for kind, array in arrays.items():
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / split / f"{number}.png")


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_works_as_printed(title, processed, tmp_path):
    shutil.copytree(ROOT / "unetseg", tmp_path / "unetseg", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(processed, tmp_path / "processed")
    for split in ("train", "val"):
        draw_pairs(tmp_path / "raw_roads", "photos", "truth", split)
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path), "WANDB_MODE": "disabled"}}
    lines = sum(len(block.splitlines()) for *_, block in STEP.findall(RECIPES[title]))
    for verb, name, language, block in STEP.findall(RECIPES[title]):
        if language != "bash":
            with open(tmp_path / name, "a", encoding="utf-8") as file:
                file.write(f"\n\n{block}" if verb == "At the end of" else block)
            continue
        for line in block.splitlines():
            done = subprocess.run([sys.executable, *line.split()[1:]], **options, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    path, text = next(found for start, found in EXPECTED.items() if title.startswith(start))
    assert 2 < lines < 20 and text in (tmp_path / path).read_text()


def test_the_class_file_of_the_page_on_data_is_read(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "classes.toml").write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    assert read_class_file(tmp_path / "classes.toml").people == ("walker",)
