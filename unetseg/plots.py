"""Every figure of the project: each function takes arrays or results and returns a matplotlib Figure, or a text."""

import math
import time
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator
from PIL import Image

from .classes import IGNORE_INDEX, PEOPLE, ClassSet
from .files import atomic_open, make_folder
from .metrics import under_rule

STAGE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe & Ito's colour-blind-safe palette
WIDTH, SCREEN = 8.5, 92  # inches: a notebook's column; pixels per inch there


def panels(rows: list[list[np.ndarray]], titles: list[str], class_set: ClassSet, row_names: list[str] = ()) -> Figure:
    """A grid of (H, W, 3) uint8 pictures of one size, titles above, row names on the left, a legend of the classes."""
    height, width = rows[0][0].shape[:2]
    gap = max(2, width // 40)
    ys, xs = ([n * (side + gap) for n in range(count)] for side, count in ((height, len(rows)), (width, len(titles))))
    whole = np.full((ys[-1] + height, xs[-1] + width, 3), 255, np.uint8)  # one picture draws faster than many
    for y, pictures in zip(ys, rows, strict=True):
        for x, picture in zip(xs, pictures, strict=True):
            whole[y : y + height, x : x + width] = picture
    figure = Figure(figsize=(WIDTH, WIDTH / len(titles) * height / width * len(rows) + 0.9), layout="constrained")
    ax = figure.subplots()
    ax.imshow(whole, interpolation="nearest", aspect="auto")
    ax.xaxis.tick_top()
    ax.set_xticks([x + width / 2 for x in xs], titles)
    ax.set_yticks([y + height / 2 for y in ys[: len(row_names)]], row_names, rotation=90, va="center")
    ax.tick_params(length=0, labelsize="large")
    ax.spines[:].set_visible(False)
    handles = [Patch(color=colour / 255, label=name) for name, colour in zip(class_set.names, class_set.colours)]
    handles.append(Patch(color="black", label="void"))
    small = {"fontsize": 8, "columnspacing": 1.2, "handlelength": 1.2, "handletextpad": 0.4, "frameon": False}
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), **small)
    return figure


def gallery(pictures: dict[str, np.ndarray], class_set: ClassSet, columns: int = 3) -> Figure:
    """Titled pictures (H, W, 3) uint8 of one size, a legend of the classes at the top right."""
    height, width = next(iter(pictures.values())).shape[:2]
    rows = len(pictures) // columns + 1
    figure = Figure(figsize=(WIDTH, WIDTH / columns * height / width * rows + 0.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, subplot_kw={"frame_on": False, "xticks": [], "yticks": []}).flat)
    for ax, (title, picture) in zip(axes[: columns - 1] + axes[columns:], pictures.items()):
        ax.imshow(picture)
        ax.set_title(title, fontsize=9)
    handles = [Patch(color=colour / 255, label=name) for name, colour in zip(class_set.names, class_set.colours)]
    axes[columns - 1].legend(handles=handles, loc="center", ncols=2, frameon=False, fontsize=9)
    return figure


def class_distribution(class_set: ClassSet, shares: dict[str, np.ndarray], title: str = "") -> Figure:
    """Bars of each class's share of the pixels; shares: label of a group of bars -> (C + 1,) in [0, 1], void last."""
    names, colours = [*class_set.names, "void"], np.vstack([class_set.colours, np.zeros((1, 3))]) / 255
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    ax = figure.subplots()
    fades = [{"color": colours, "alpha": 1 if group == 0 else 0.5} for group in range(len(shares))]
    _grouped_bars(ax, names, [100 * share for share in shares.values()], fades, "{:.1f}")
    ax.set(ylabel="share of pixels, %", title=title)
    ax.margins(y=0.12)
    handles = [Patch(label=label, **fade | {"color": "0.3"}) for label, fade in zip(shares, fades)]
    ax.legend(handles=handles, frameon=False)
    return _clean(figure)


def weights_table(names: tuple[str, ...], num_pixels: np.ndarray, weights: np.ndarray) -> str:
    """Each class's share of the (N, C) pixels, its weight (C,), and its share of the loss at equal error, as text."""
    share = num_pixels.sum(axis=0) / num_pixels.sum()
    mass = share * weights / (share * weights).sum()
    lines = [f"{'class':<16}{'pixels':>9}{'weight':>9}{'of the loss':>13}"]
    lines += [f"{n:<16}{s:>8.1%} {w:>8.2f}{m:>12.1%}" for n, s, w, m in zip(names, share, weights, mass)]
    return "\n".join(lines)


def training_curves(histories: dict[str, list[dict]]) -> Figure:
    """Training loss (thin), val loss, and val mIoU by epoch; histories: run -> rows as in history.csv."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (title, history) in zip(STAGE_COLOURS, histories.items()):
        keys = "epoch", "train_loss", "val_loss", "val_miou"
        epoch, train_loss, val_loss, values = (np.array([float(row[key]) for row in history]) for key in keys)
        left.plot(epoch, train_loss, lw=0.8, color=colour)
        left.plot(epoch, val_loss, "o-", ms=2, lw=1.8, color=colour)
        right.plot(epoch, values, "o-", ms=2, lw=1.8, color=colour, label=f"{title}: {values[-1]:.3f}")
    left.set(xlabel="epoch", ylabel="loss: train thin, val thick", yscale="log")
    right.set(xlabel="epoch", ylabel="val mIoU")
    right.legend(frameon=False, fontsize=7)
    for ax in (left, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
    left.minorticks_off()
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
    left.yaxis.set_major_formatter("{x:g}")
    return _clean(figure)


def verdicts(rows: Iterable[dict]) -> Figure:
    """Differences to the control in points of mIoU and of the IoU of people, with 95 % intervals; a filled mark is a
    verdict, a hollow one none. rows: those of a plan's summary."""
    rows = [row for row in rows if "miou_against_control" in row][::-1]
    figure = Figure(figsize=(WIDTH, 0.26 * len(rows) + 0.9), layout="constrained")
    for ax, (key, name) in zip(figure.subplots(1, 2, sharey=True), (("miou", "mIoU"), ("person_iou", "person"))):
        for place, found in enumerate(row.get(f"{key}_against_control", {}) for row in rows):
            if "interval" not in found:
                continue
            low, middle, high = 100 * np.array([found["interval"][0], found["difference"], found["interval"][1]])
            colour = {"better": STAGE_COLOURS[2], "worse": "#D55E00"}.get(found.get("verdict"), "0.5")
            ax.plot([low, high], [place, place], color=colour, lw=1.5)
            ax.plot(middle, place, "o", ms=5, color=colour, mfc="white" if colour == "0.5" else colour)
        ax.axvline(0, color="0.3", lw=0.8)
        ax.set(xlabel=f"points of {name}")
        ax.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    return _clean(figure)


def lost_under_occluders(rows: Iterable[dict]) -> Figure:
    """mIoU that visible pixels lose under each kind of occluders, for the rows of a plan's summary."""
    prefix = "lost_under_occluders "
    rows = [row for row in rows if any(key.startswith(prefix) for key in row.get("mean", {}))]
    kinds = [key.removeprefix(prefix) for key in rows[0]["mean"] if key.startswith(prefix)] if rows else []
    figure = Figure(figsize=(WIDTH, 0.26 * len(rows) + 0.9), layout="constrained")
    ax = figure.subplots()
    for colour, kind in zip(STAGE_COLOURS, kinds):
        values = [row["mean"][prefix + kind] for row in rows[::-1]]
        ax.plot(values, range(len(rows)), "o", ms=5, color=colour, label=kind)
    ax.set_yticks(range(len(rows)), [row["title"] for row in rows[::-1]], fontsize=8)
    ax.set(xlabel="mIoU lost on visible pixels", xlim=(0, None))
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return _clean(figure)


def confusion_matrix(results: dict) -> Figure:
    """Shares of each true class (row) by predicted class (column), from what `evaluate_run` returns, under the void
    rule that the run was trained under; rows and columns of people are framed."""
    void = results["trained_void"]
    names, counts = [*results["rules"][void]["classes"]], under_rule(np.array(results["confusion"]), void)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = max(4.6, 0.5 * len(names) + 1.4)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    for row, col in np.ndindex(shares.shape):
        colour = "white" if shares[row, col] < 0.6 else "black"
        ax.text(col, row, f"{100 * shares[row, col]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    for place in [names.index(name) for name in PEOPLE if name in names]:
        frame = {"fill": False, "edgecolor": "#D55E00", "linewidth": 2}
        ax.add_patch(Rectangle((-0.5, place - 0.5), len(names), 1, **frame))
        ax.add_patch(Rectangle((place - 0.5, -0.5), 1, len(names), **frame))
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="prediction", ylabel="truth")
    figure.colorbar(image, ax=ax, label="share of the true class's pixels", shrink=0.8)
    return figure


def error_map(image: np.ndarray, mask: np.ndarray, pred: np.ndarray, near: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 in grey, with wrong pixels in orange where `near` (H, W) bool is true, else in red."""
    painted = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2) * 0.5 + 96
    wrong = (mask != IGNORE_INDEX) & (mask != pred)
    painted[wrong & near], painted[wrong & ~near] = (230, 159, 0), (200, 30, 30)
    return painted.astype(np.uint8)


def robustness_curves(found: dict) -> Figure:
    """mIoU on visible, covered and all pixels against coverage, a panel per occluder; bands are 95 % intervals."""
    kinds = list(dict.fromkeys(row["kind"] for row in found["occlusion"] if "all" in row))
    figure = Figure(figsize=(WIDTH, 1.9 * -(-len(kinds) // 3) + 0.6), layout="constrained")
    for ax, kind in zip(figure.subplots(-(-len(kinds) // 3), 3, sharex=True, sharey=True, squeeze=False).flat, kinds):
        for aimed, style in ((False, "o-"), (True, "s--")):
            rows = [row for row in found["occlusion"] if (row["kind"], row["aimed"]) == (kind, aimed) and "all" in row]
            share = [0.0] + [100 * row["covered_share"] for row in rows]
            for name, colour in zip(("all", "visible", "covered"), STAGE_COLOURS):
                values = [row[name]["miou"] for row in rows]
                values = np.array([None if name == "covered" else found["clean"], *values], float)
                label = f"{name}, {'people' if aimed else 'anywhere'}"
                ax.plot(share, values, style, ms=3, color=colour, label=label, lw=1.2)
            ends = [row["all"]["change"].get("interval", [np.nan] * 2) for row in rows]
            ends = (found["clean"] or np.nan) + np.reshape(ends, (-1, 2)).T
            ax.fill_between(share[1:], *ends, color=STAGE_COLOURS[0], alpha=0.15, lw=0)
        ax.set(title=kind, xlabel="covered, %", ylabel="mIoU")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return _clean(figure)


def iou_by_stage(scores: dict[str, dict[str, float | None]]) -> Figure:
    """IoU per class of several runs; scores: run -> {class or "mIoU": value in [0, 1], None for an absent class}; their
    accuracy is left out."""
    names = [name for name in next(iter(scores.values())) if name != "accuracy"]
    values = [[np.nan if score[name] is None else score[name] for name in names] for score in scores.values()]
    styles = [{"color": STAGE_COLOURS[n % len(STAGE_COLOURS)], "label": run} for n, run in enumerate(scores)]
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    ax = figure.subplots()
    _grouped_bars(ax, names, values, styles, "{:.2f}")
    ax.set(ylabel="IoU", ylim=(0, 1.05))
    figure.legend(loc="outside upper center", ncols=len(scores), frameon=False)
    return _clean(figure)


def _grouped_bars(ax: Axes, names: list[str], groups: list, styles: list[dict], number: str) -> None:
    """Bars side by side for each name, each with its value above; NaN is a dash."""
    width = 0.8 / len(groups)
    for group, (values, style) in enumerate(zip(groups, styles, strict=True)):
        places = np.arange(len(names)) + (group - (len(groups) - 1) / 2) * width
        bars = ax.bar(places, values, width, **style)
        texts, upright = [number.format(v) if v == v else "–" for v in values], 90 * (len(names) * len(groups) > 16)
        ax.bar_label(bars, texts, fontsize=7, padding=2, rotation=upright)
    ax.set_xticks(range(len(names)), names, rotation=30 if len(names) > 9 else 0)


def save(figure: Figure, path: Path, dpi: int | None = None) -> Path:
    """Write a figure as .png (drawings, in 256 colours), .svg, or .jpg (photographs); same figure, same bytes."""
    options = {".jpg": {"pil_kwargs": {"quality": 55, "progressive": True}}, ".svg": {"metadata": {"Date": None}}}
    dpi = dpi or (120 if path.suffix == ".jpg" else 2 * SCREEN)
    with atomic_open(make_folder(path.parent) / path.name) as file, BytesIO() as content:
        figure.savefig(content, format=path.suffix[1:], dpi=dpi, **options.get(path.suffix, {}))
        if path.suffix == ".png":
            Image.open(content).convert("RGB").quantize(256).save(file, format="PNG")
        else:
            file.write(content.getbuffer())
    return path


def show(figure: Figure, path: Path):
    """Save a figure and return it as a notebook cell's picture, at double density."""
    from IPython import display

    return display.Image(filename=str(save(figure, path)), width=round(figure.get_figwidth() * SCREEN))


class LiveCurves:
    """`show` of `run.train` in a notebook: a line per epoch, and curves that are redrawn now and then."""

    def __init__(self, path: Path, every: float = 5.0) -> None:
        self.path, self.every, self.drawn, self.handle = path, every, -math.inf, None

    def __call__(self, history: list[dict]) -> None:
        row = history[-1]
        losses = f"loss {row['train_loss']:.3f}, on val {row['val_loss']:.3f}, val mIoU {row['val_miou']:.3f}"
        print(f"epoch {row['epoch']:>3.0f}  {losses}, {row['seconds']:.0f} s", flush=True)
        if time.monotonic() - self.drawn > self.every:
            self.draw(history)

    def draw(self, history: list[dict]) -> None:
        from IPython.display import display

        if not history:
            return
        curves = training_curves({self.path.stem.removeprefix("curves_"): history})
        picture, self.drawn = show(curves, self.path), time.monotonic()
        if self.handle:
            self.handle.update(picture)
        else:
            self.handle = display(picture, display_id=True)


def _clean(figure: Figure) -> Figure:
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3)
        ax.set_axisbelow(True)
    return figure
