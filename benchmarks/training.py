"""Training and evaluation: what the loop, the loader and precision by rule cost or gain.

    python benchmarks/training.py [--home FOLDER]

Every contender runs in a process of its own. Writes benchmarks/results/training.json.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from measure import Row, compare_processes, load, processed_scenes, save
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from unetseg import device, train
from unetseg.data import Batches
from unetseg.losses import cross_entropy, deep_supervision
from unetseg.model import build_model
from unetseg.optimizers import OPTIMIZERS
from unetseg.settings import Settings, complete, with_preset

BATCH = 8


def settings_of(preset: str) -> dict:
    """The settings of a preset, or of the default one under AdamW, on this device, without epochs at half the size."""
    chosen = {"default": {"stage": "scratch"}, "adamw": {"stage": "scratch", "optimizer": "adamw"}}
    precision = device.precision_rule(device.pick_device())
    return complete(chosen.get(preset, {"stage": preset}) | {"precision": precision})


def network(preset: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(settings_of(preset), 7)


def state_of(preset: str, home: Path, steps: int) -> train.State:
    """A preset's network and optimiser with the precision of this device, as a run has them; nothing is saved."""
    config = {"settings": settings_of(preset), "cycles": [10**6], "classes": ["x"] * 7}
    return train.State(network(preset).to(device.pick_device()), home / "none", config, steps, train.Stopper())


def our_epoch(
    preset: str, home: Path, images: int, occlusion: float = 0.0, constant: bool = False
) -> Callable[[], None]:
    """`train_one_epoch` with loader and augmentation, or with one constant batch."""
    state, data = state_of(preset, home, -(-images // BATCH)), load(home, images)
    batches = Batches(data, BATCH, state.device, with_preset(Settings(occlusion=occlusion)))
    same, numbers = next(batches.epoch(1)), itertools.count(1)

    def batches_of_epoch() -> Iterator:
        return itertools.repeat(same, len(batches)) if constant else batches.epoch(next(numbers))

    def step() -> None:
        train.train_one_epoch(state, state.watch(batches_of_epoch()), cross_entropy, tqdm(disable=True))
        state.step, state.history = 0, [*state.history, {}]

    return step


def bare_epoch(preset: str, home: Path, images: int) -> Callable[[], None]:
    """The same network, precision and batches, and nothing else: no sums, no guards, no progress, nothing saved."""
    state, data = state_of(preset, home, 1), load(home, images)
    batches, model = Batches(data, BATCH, state.device, with_preset(Settings(occlusion=0.0))), state.model.train()
    optimizer = OPTIMIZERS[settings_of(preset)["optimizer"]](model.parameters(), lr=1e-3, fused=True)
    numbers = itertools.count(1)

    def step() -> None:
        for pictures, masks, _ in batches.epoch(next(numbers)):
            deep_supervision(cross_entropy, train.forward(model, pictures, state.precision), masks)[0].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


class Files(Dataset):
    """What most people write: an image and a mask per item, read when asked for."""

    def __init__(self, processed: Path) -> None:
        self.images = sorted((processed / "images_processed" / "train").glob("*.npy"))

    def __len__(self) -> int:
        return 10**5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.images[index % len(self.images)]
        mask = Image.open(str(path).replace("images_processed", "masks_processed").replace(".npy", ".png"))
        image = torch.from_numpy(np.load(path).transpose(2, 0, 1).copy())
        return image, torch.from_numpy(np.array(mask).astype(np.int64))


def smp_unet() -> nn.Module:
    """segmentation_models_pytorch as documented: ResNet-34 encoder (no weights to download here)."""
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=7)


def monai_unet() -> nn.Module:
    """MONAI's residual U-Net with as many levels and channels as our default."""
    from monai.networks.nets import UNet

    return UNet(2, 3, 7, channels=(32, 64, 128, 256, 512), strides=(2, 2, 2, 2), num_res_units=2)


def common_loop(make: Callable, argument: tuple, home: Path, steps: int) -> Callable[[], None]:
    """The loop most people run: fp32, default memory format, DataLoader, Adam, `.item()` at each step."""
    where = device.pick_device()
    model = make(*argument).to(where).train()
    optimizer, criterion = torch.optim.Adam(model.parameters(), 1e-4), nn.CrossEntropyLoss(ignore_index=255)
    loader = iter(DataLoader(Files(processed_scenes(home)), BATCH, shuffle=True, num_workers=2))

    def step() -> None:
        for images, masks in itertools.islice(loader, steps):
            optimizer.zero_grad()
            loss = criterion(model(images.to(where)), masks.to(where))
            loss.backward()
            optimizer.step()
            loss.item()

    return step


def evaluation(home: Path) -> Callable[[], None]:
    """The scores of 32 images, as `evaluate` takes them."""
    model, dataset = network("default").to(device.pick_device(), memory_format=torch.channels_last), load(home, 32)
    batches = Batches(dataset, BATCH, device.pick_device())
    return lambda: train.evaluate(model, batches.epoch(), 7, cross_entropy)


def forward_alone(home: Path) -> Callable[[], None]:
    """The same network's forward passes over as many batches of the same size."""
    model = network("default").to(device.pick_device(), memory_format=torch.channels_last).eval()
    images = torch.rand(BATCH, 3, 256, 256, device=device.pick_device())
    return torch.inference_mode()(lambda: [model(images) for _ in range(4)])


def measure(home: Path) -> list[Row]:
    default, many = ("default", home, 32), 32
    rows = [
        compare_processes("training, default preset", "one constant batch, no augmentation",
                          (our_epoch, *default), (our_epoch, *default, 0.0, True), many),
        compare_processes("training, default preset, occlusion", "one constant batch, no augmentation",
                          (our_epoch, *default, 0.5), (our_epoch, *default, 0.0, True), many),
        compare_processes("training, default preset", "the same under AdamW",
                          (our_epoch, *default), (our_epoch, "adamw", home, 32), many),
        compare_processes("training, default preset", "a bare loop",
                          (our_epoch, *default), (bare_epoch, *default), many),
        compare_processes("training, published preset", "the loop most people run",
                          (our_epoch, "published", home, 8), (common_loop, network, ("published",), home, 1), 8),
        compare_processes("training, default preset", "smp's U-Net in the loop most people run",
                          (our_epoch, *default), (common_loop, smp_unet, (), home, 4), many),
        compare_processes("training, default preset", "MONAI's U-Net in the loop most people run",
                          (our_epoch, *default), (common_loop, monai_unet, (), home, 4), many),
        compare_processes("evaluation, default preset", "forward passes alone",
                          (evaluation, home), (forward_alone, home), 32),
    ]  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("runs/bench"), help="scratch folder")
    home = parser.parse_args().home
    processed_scenes(home)
    save("training", measure(home))


if __name__ == "__main__":
    main()
