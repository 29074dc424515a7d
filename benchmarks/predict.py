"""Predicting photographs of 2048x1024 against the sum of what cannot be done without, and forward passes.

    python benchmarks/predict.py [--home FOLDER]

Writes benchmarks/results/predict.json.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from measure import PRESETS, SHARED, Row, compare, compare_processes, processed_scenes, quietly, save

from unetseg import device, images
from unetseg.classes import CLASS_SETS
from unetseg.model import UNet
from unetseg.show.predict import Predictor, predict_files
from unetseg.tools import scenes
from unetseg.train import forward

SIZE, NUMBER = (256, 256), 8


def trained(home: Path) -> Path:
    """The weights of a short run of the default preset."""
    data = processed_scenes(home)
    quietly("train", "scratch", "--data", data, "--out", home / "run", "--epochs", 1)
    return home / "run"


def photographs(home: Path) -> list[Path]:
    """Real frames where there are some, else drawn ones, in a folder of their own."""
    real = sorted(SHARED.glob("cityscapes_sample/leftImg8bit/*/*/*.png"))
    if not real:
        scenes.draw_dataset(home / "drawn_photos", {"train": NUMBER, "val": 1}, (2048, 1024), seed=0)
        real = sorted((home / "drawn_photos/leftImg8bit").rglob("*.png"))
    folder = home / "photos"
    folder.mkdir(exist_ok=True)
    for path in real[:NUMBER]:
        if not (folder / path.name).exists():
            os.symlink(path.resolve(), folder / path.name)
    return sorted(folder.iterdir())


def parts(model: torch.nn.Module, paths: list[Path], precision: str) -> float:
    """Seconds of decoding, the forward pass and encoding three pictures, of each photograph, in one thread."""
    where, start = next(model.parameters()).device, time.perf_counter()
    for path in paths:
        image = images.read_photo(path)
        small = torch.from_numpy(cv2.resize(image, SIZE)).to(where).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            pred = forward(model, small, precision)[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
        ids = cv2.resize(pred, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        painted = CLASS_SETS["cityscapes7"].paint(ids)
        for picture in (ids, painted, images.overlay(image, painted)):
            cv2.imencode(".png", picture)
    return time.perf_counter() - start


def passes(plain: bool, batch: int) -> Callable[[], None]:
    """Forward passes: plain PyTorch in fp32, or as `predict` does them on this device."""
    model, where = UNet(7, *PRESETS["default"]).eval(), device.pick_device()
    model = model.to(where) if plain else model.to(where, memory_format=torch.channels_last)
    precision, pictures = "fp32" if plain else device.precision_rule(where), torch.rand(batch, 3, *SIZE, device=where)
    return torch.inference_mode()(lambda: forward(model, pictures, precision))


def measure(home: Path) -> list[Row]:
    run, paths = trained(home), photographs(home)
    predictor = Predictor(run)
    model, precision = predictor.model, predictor.how["precision"]

    def whole() -> float:
        start = time.perf_counter()
        assert len(predict_files(predictor, paths, home / "predicted")[0]) == len(paths)
        return time.perf_counter() - start

    rows = [compare(f"predict, {len(paths)} photographs of 2048x1024", "decode + forward + encode, summed",
                    whole, lambda: parts(model, paths, precision), len(paths))]  # fmt: skip
    for batch in (1, 16):
        what = f"forward passes at 256x256, batch {batch}"
        rows.append(
            compare_processes(what, "plain PyTorch, fp32", (passes, False, batch), (passes, True, batch), batch)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    save("predict", measure(parser.parse_args().home))


if __name__ == "__main__":
    main()
