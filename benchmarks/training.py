"""Training: what loader, engine and settings cost or gain, and how near a step comes to the machine's limit.

    python benchmarks/training.py [--home FOLDER] [--large]

Every contender runs in a process of its own. --large measures the 31 M network, its memory, U-Nets of
segmentation_models_pytorch and MONAI in the training loops of their documentation, and the machine's limit instead.
Writes benchmarks/results/training.json or training_large.json.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import PRESETS, Contender, Row, compare_processes, load, processed_scenes, save, settle
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from unetseg.session import Session
from unetseg.trainer import Trainer, forward

from unetseg import device, engine, memory, stages
from unetseg.data import Batches
from unetseg.losses import cross_entropy
from unetseg.model import UNet

BATCH, SIZE, STEPS = 8, 256, 1


def trainer_of(preset: str, size: int = SIZE) -> Trainer:
    """A preset's network and optimiser, computing as is fastest here."""
    torch.manual_seed(0)
    model = UNet(7, *PRESETS[preset]).to(device.pick_device())
    chosen = device.choose(model, (size, size), compiled="no")
    return Trainer(model, 10**6, 1e-3, 0.01, chosen.precision, chosen.memory_format)


def our_steps(preset: str, home: Path, stage: str, constant: bool = False, steps: int = STEPS) -> Callable[[], None]:
    """Some steps of training: with the loader and a stage's augmentation, or with one constant batch."""
    train_set, trainer = load(processed_scenes(home, 64), BATCH * 8), trainer_of(preset)
    settings = stages.Settings(stage, "", "")
    batches = Batches(train_set, BATCH, trainer.device, 0, stages.augmentation(settings, train_set))
    stream = (batch for epoch in itertools.count() for batch in batches.epoch(epoch))
    same = next(stream)
    trainer.model.train()

    def step() -> None:
        for images, masks in itertools.repeat(same, steps) if constant else itertools.islice(stream, steps):
            trainer.step(images, masks, cross_entropy)
        settle()

    return step


def our_fit(home: Path, images: int, size: int) -> Callable[[], None]:
    """An epoch of `fit` without its evaluation: guards, sums and progress bar included (a save is due in 3 minutes)."""
    train_set, trainer = load(processed_scenes(home, 64, size), images), trainer_of("default", size)
    batches = Batches(train_set, BATCH, trainer.device)

    def step() -> None:
        job = engine.Job(home / "fit", 1, train_set.class_set.names, "ignore", {})
        keeper = engine.Keeper(trainer, job, Session())
        with Session() as keeper.session, open(os.devnull, "w") as nowhere:
            progress = tqdm(total=images, file=nowhere, mininterval=1)
            watched = keeper.watch(batches.epoch())
            engine.train_one_epoch(trainer, watched, cross_entropy, keeper.position, progress)

    return step


def bare_loop(home: Path, images: int, size: int) -> Callable[[], None]:
    """The same network, precision and batches, and nothing else: no sums, no guards, no progress, nothing saved."""
    train_set, trainer = load(processed_scenes(home, 64, size), images), trainer_of("default", size)
    model, batches = trainer.model.train(), Batches(train_set, BATCH, trainer.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step() -> None:
        for images, masks in batches.epoch():
            loss = cross_entropy(forward(model, images, trainer.precision), masks)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        settle()

    return step


class Files(Dataset):
    """What most people write: an image and a mask per item, read when asked for."""

    def __init__(self, processed: Path, length: int) -> None:
        self.images = sorted((processed / "images_processed" / "train").glob("*.npy"))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.images[index % len(self.images)]
        mask = Image.open(str(path).replace("images_processed", "masks_processed").replace(".npy", ".png"))
        image = torch.from_numpy(np.load(path).transpose(2, 0, 1).copy())
        return image, torch.from_numpy(np.array(mask).astype(np.int64))


def common_loop(make: Callable[[], nn.Module], home: Path, steps: int = STEPS) -> Callable[[], None]:
    """The loop most people run: fp32, default memory format, DataLoader, Adam, `.item()` at each step."""
    where = device.pick_device()
    model = make().to(where).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    criterion, dataset = nn.CrossEntropyLoss(ignore_index=255), Files(processed_scenes(home, 64), BATCH * 10**4)
    loader = iter(DataLoader(dataset, BATCH, shuffle=True, num_workers=2, pin_memory=where.type == "cuda"))

    def step() -> None:
        for images, masks in itertools.islice(loader, steps):
            images, masks = images.to(where), masks.to(where)
            optimizer.zero_grad()
            loss = criterion(model(images), masks)
            loss.backward()
            optimizer.step()
            loss.item()

    return step


def unet(preset: str) -> nn.Module:
    return UNet(7, *PRESETS[preset])


def smp_unet() -> nn.Module:
    """The documentation's example: ResNet-34 encoder (no weights to download here), Adam, CE."""
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=7)


def monai_unet() -> nn.Module:
    """The tutorials' U-Net with strides of 2 and two residual units, at twice their widths."""
    from monai.networks.nets import UNet as MonaiUNet

    shape = {"spatial_dims": 2, "in_channels": 3, "out_channels": 7, "num_res_units": 2}
    return MonaiUNet(**shape, channels=(64, 128, 256, 512, 1024), strides=(2, 2, 2, 2))


def giga_flops(model: nn.Module, training: bool = True) -> float:
    """GFLOP of a step (forward and backward) per image at SIZE x SIZE, by torch's counter (a multiply-add is two)."""
    image = torch.rand(1, 3, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter:
        out = model.train()(image.expand(2, -1, -1, -1))
        if training:
            out.sum().backward()
    return counter.get_total_flops() / 2e9


def peak(precision: str, kind: str) -> Callable[[], None]:
    """A step at the machine's best: a large matrix product, or a 3x3 convolution at the network's middle."""
    memory.keep_freed()
    where, dtype = device.pick_device(), device.DTYPES[precision]
    if kind == "matmul":
        a = torch.rand(2048, 2048, device=where, dtype=dtype)
        return lambda: (a @ a, settle())
    layer = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(where, dtype, memory_format=torch.channels_last)
    x = torch.rand(8, 256, 64, 64, device=where).to(dtype).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.inference_mode():
            layer(x)
        settle()

    return step


PEAK_FLOPS = {"matmul": 2 * 2048**3, "convolution": 2 * 8 * 256 * 256 * 9 * 64 * 64}


def roofline(home: Path, preset: str) -> Row:
    """FLOP/s of a whole step as a share of what a convolution alone reaches in the same precision."""
    trainer = trainer_of(preset)
    work, precision = giga_flops(UNet(7, *PRESETS[preset])) * BATCH * STEPS, trainer.precision
    ratios, seconds, rates = [], {"step": []}, {"matmul": [], "convolution": []}
    with (
        Contender(our_steps, preset, home, "scratch", True) as step,
        Contender(peak, precision, "matmul") as matmul,
        Contender(peak, precision, "convolution") as convolution,
    ):
        for _ in range(5):
            seconds["step"].append(step.run()[0])
            for name, contender in (("matmul", matmul), ("convolution", convolution)):
                fastest = min(contender.run()[0] for _ in range(5))
                rates[name].append(PEAK_FLOPS[name] / fastest / 1e9)
            ratios.append(work / seconds["step"][-1] / rates["convolution"][-1])
    facts = {"precision": precision, "gflop_per_image": work / BATCH / STEPS}
    facts |= {f"{name}_gflops": statistics.median(values) for name, values in rates.items()}
    facts["step_gflops"] = work / statistics.median(seconds["step"])
    row = Row(
        f"FLOP/s of a step, {preset} preset", f"a 3x3 convolution alone ({precision})", "", ratios, seconds, facts
    )
    print(row, {key: value if isinstance(value, str) else round(value) for key, value in facts.items()}, flush=True)
    return row


def per_flop(row: Row, ours: nn.Module, theirs: nn.Module) -> Row:
    """The same comparison for equal work."""
    work = giga_flops(ours), giga_flops(theirs)
    ratios = [ratio * work[0] / work[1] for ratio in row.ratios]
    adjusted = Row(f"{row.what}, per FLOP", row.against, "≥ 1", ratios, notes={"gflop_per_image": work})
    print(adjusted, flush=True)
    return adjusted


def small(home: Path) -> list[Row]:
    """What fits into `make bench`."""
    rows = []
    for stage in ("scratch", "ce_dice"):
        what, parts = f"a step of the default preset, loader and {stage}'s augmentation", ("default", home, stage)
        aim = "≤ 1.05" if device.pick_device().type == "cpu" else "≤ 1.10"
        steps = (our_steps, *parts), (our_steps, *parts, True)
        rows.append(compare_processes(what, "the same step with one constant batch", aim, *steps))
    images = BATCH * 4
    fits = (our_fit, home, images, 128), (bare_loop, home, images, 128)
    rows.append(compare_processes("fit, images/s (default preset at 128x128)", "a bare loop", "≥ 0.97", *fits))
    aim = "≥ 2.5" if device.pick_device().type == "cpu" else "≥ 4"
    contenders = (our_steps, "published", home, "scratch", False, 1), (common_loop, published, home, 1)
    rows.append(compare_processes("training, images/s, published preset", "the loop most people run", aim, *contenders))
    return rows


def published() -> nn.Module:
    return unet("published")


def large_network() -> nn.Module:
    return unet("31 M")


def large(home: Path) -> list[Row]:
    """What takes longer: the 31 M network and the peers."""
    aim = "≥ 2.5" if device.pick_device().type == "cpu" else "≥ 4"
    ours = our_steps, "31 M", home, "scratch", False, 1
    rows = [
        compare_processes(
            "training, images/s, 31 M", "the loop most people run", aim, ours, (common_loop, large_network, home, 1)
        )
    ]
    peaks = rows[0].notes["peak_mebibytes"]
    rows.append(
        Row(
            "peak training memory, 31 M, batch 8",
            "the loop most people run",
            "≤ 0.7",
            [peaks["ours"] / peaks["theirs"]],
            notes=peaks,
        )
    )
    print(rows[-1])
    for name, make, preset in (("segmentation_models_pytorch", smp_unet, "default"), ("MONAI", monai_unet, "default")):
        ours, theirs = (our_steps, preset, home, "scratch"), (common_loop, make, home)
        row = compare_processes(
            f"training, images/s, {preset} preset", f"{name}'s U-Net, its documented loop", "", ours, theirs
        )
        rows += [row, per_flop(row, unet(preset), make())]
    return [*rows, roofline(home, "default")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    processed_scenes(args.home, 64)
    start = time.monotonic()
    rows = large(args.home) if args.large else small(args.home)
    save("training_large" if args.large else "training", rows, seconds=time.monotonic() - start)


if __name__ == "__main__":
    main()
