"""Tools around the library: preprocessing, data layouts, drawn scenes, doctor, Kaggle. The core never imports them."""

import argparse
from collections.abc import Callable


def parse_size(text: str) -> tuple[int, int]:
    """Read "1024x512" (width x height), or "256" for a square."""
    width, _, height = text.partition("x")
    size = int(width), int(height or width)
    if not 8 <= min(size) <= max(size) <= 8192:
        raise argparse.ArgumentTypeError(f"expected sides from 8 to 8192 pixels, found {text}")
    return size


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, found {text}")
        return int(text)

    return parse
