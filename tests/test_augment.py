import pytest
import torch

from unetseg import augment
from unetseg.augment import AUGMENTATIONS, Source, basic, epoch_draws, occlude

N, H, W = 6, 24, 32


def coordinates():
    """Images whose red and green channels are their own x and y, and masks that number blocks of 4x4 pixels."""
    ys, xs = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    images = torch.stack([(xs + 0.5) / W, (ys + 0.5) / H, torch.full((H, W), 0.5)]).expand(N, 3, H, W).clone()
    return images, (ys // 4 * (W // 4) + xs // 4).expand(N, H, W).clone()


def draws(name, seed=0, epoch=1, **fixed):
    """An epoch's draws of an augmentation, of which some are fixed; seed None: all the others are 1/2."""
    table = torch.full((N, 20), 0.5) if seed is None else epoch_draws(name, N, seed, epoch)
    found = dict(zip(AUGMENTATIONS[name].draws, table.unbind(1)))
    return found | {key: torch.full((N,), float(value)) for key, value in fixed.items()}


@pytest.fixture
def scene():
    torch.manual_seed(0)
    return torch.rand(N, 3, H, W), torch.randint(0, 5, (N, H, W))


def test_image_and_mask_stay_aligned_to_the_pixel():
    images, masks = coordinates()
    moved, moved_masks = basic(images, masks, draws("basic", 3), colour=0.0)
    xs, ys = moved[:, 0] * W - 0.5, moved[:, 1] * H - 0.5  # where each pixel came from
    seen = moved_masks != 255
    blocks = (ys.round() // 4 * (W // 4) + xs.round() // 4).long()
    on_edge = ((xs % 1 - 0.5).abs() < 1e-3) | ((ys % 1 - 0.5).abs() < 1e-3)  # between two pixels: either is right
    assert ((blocks == moved_masks) | on_edge)[seen].all()
    assert seen.float().mean() > 0.5 and (on_edge & seen).float().mean() < 0.2


def test_zooming_out_mirrors_the_image_at_its_edges():
    images, masks = coordinates()
    moved, out = basic(images, masks, draws("basic", None, flip=0.9, zoom=0.0))  # zoom 0.6, centred
    assert set(out.unique().tolist()) <= set(masks.unique().tolist())
    width = moved[0, 0, H // 2] * W - 0.5  # the column that each pixel came from: down to 0, up to the end, down
    turns = (width.diff().sign().diff() != 0).sum().item()
    assert turns == 2 and width.min() < 1 and width.max() > W - 2


def test_centred_windows_show_the_instance(scene):
    images, masks = scene
    masks = torch.zeros_like(masks)
    masks[:, 18:22, 26:30] = 1
    source = Source(torch.tensor([[[26.0, 18.0, 30.0, 22.0]]]).expand(N, 1, 4), torch.ones(N, dtype=torch.long), None)
    for seed in range(5):
        found = draws("basic", seed, zoom=0.99, centre=0.0)  # a window of 0.71 of the sides
        assert (basic(images, masks, found, source, centred=1.0)[1] == 1).flatten(1).any(dim=1).all()
    far = draws("basic", 0, zoom=0.99, shift_x=0.0, shift_y=0.0, flip=0.9)
    assert not (basic(images, masks, far, source, centred=0.0)[1] == 1).any()


def test_void_stays_void(scene):
    images, masks = scene
    masks[:, :3] = 255
    _, out = basic(images, masks, draws("basic", None, flip=0.9))
    assert (out[:, :3] == 255).all() and (out[:, 3:] != 255).all()


BOX = [4.0, 6.0, 12.0, 18.0]


def occlude_all(images, masks, found, aimed=0.0, occluded="keep", of=slice(None), size=0.4):
    boxes, donors = torch.tensor([[BOX]]).expand(N, 1, 4), images.flip(0)
    source = Source(boxes[of], torch.ones(N, dtype=torch.long)[of], lambda draw: donors[of])
    return occlude(images[of], masks[of], {k: v[of] for k, v in found.items()}, source, 1.0, aimed, size, occluded)


@pytest.mark.parametrize("size", [0.4, 0.6])
@pytest.mark.parametrize("kind", range(4), ids=augment.TEXTURES)
def test_an_occluder_is_one_rectangle_and_the_mask_keeps_its_classes(scene, kind, size):
    images, masks = scene
    largest = {"width": 0.999, "height": 0.999}
    found = draws("occlude", None, x=0.3, y=0.7, texture=(kind + 0.5) / 4, red=0.123, **largest)
    out, out_masks = occlude_all(images, masks, found, size=size)
    changed = (out != images).any(dim=1)
    assert (out_masks == masks).all() and out.min() >= 0 and out.max() <= 1
    for image in changed:
        ys, xs = image.nonzero(as_tuple=True)
        height, width = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
        assert image.any() and image.sum() >= 0.9 * height * width
        assert (height, width) == (pytest.approx(size * H, abs=1), pytest.approx(size * W, abs=1))


def test_noise_comes_in_squares_of_its_grain(scene):
    images, masks = scene
    whole = {"width": 0.999, "height": 0.999, "x": 0.0, "y": 0.0, "roll_x": 0.0, "roll_y": 0.0}
    found = draws("occlude", None, texture=0.6, grain=2.5 / augment.GRAINS, **whole)
    out, _ = occlude_all(images, masks, found, size=1.0)
    squares = out.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert (squares == squares[..., :1]).all() and (out[..., 3] != out[..., 4]).any()


def test_aimed_occluders_lie_on_the_instance(scene):
    images, masks = scene
    out, out_masks = occlude_all(images, masks, draws("occlude", aim=0.0), aimed=1.0, occluded="void")
    covered = out_masks == 255
    assert covered.flatten(1).any(dim=1).all()
    covered[:, 6:18, 4:12] = False
    assert not covered.any()
    assert ((out != images).any(dim=1) <= (out_masks == 255)).all()


def test_inputs_are_never_modified(scene):
    images, masks = scene
    before = images.clone(), masks.clone()
    occlude_all(images, masks, draws("occlude"), occluded="void")
    basic(images, masks, draws("basic"))
    assert (images == before[0]).all() and (masks == before[1]).all()


def test_a_sample_looks_the_same_in_any_batch(scene):
    images, masks = scene
    occluder, change = draws("occlude", 7, 2), draws("basic", 7, 2)
    whole = basic(*occlude_all(images, masks, occluder), change)
    for i in (0, 3, 5):
        of = slice(i, i + 1)
        alone = basic(*occlude_all(images, masks, occluder, of=of), {k: v[of] for k, v in change.items()})
        assert torch.allclose(alone[0], whole[0][of], atol=1e-6) and (alone[1] == whole[1][of]).all()


def test_draws_depend_on_augmentation_seed_and_epoch_alone():
    table = epoch_draws("basic", 20, 1, 3)
    assert (table == epoch_draws("basic", 20, 1, 3)).all()
    for other in (epoch_draws("basic", 20, 1, 4), epoch_draws("basic", 20, 2, 3), epoch_draws("occlude", 20, 1, 3)):
        assert not (table == other[:, : table.shape[1]]).any(dim=0).any()


def test_recolouring_is_brightness_then_contrast_then_saturation():
    found = draws("basic", 1)
    images = torch.rand(N, 3, 8, 6, generator=torch.Generator().manual_seed(2))
    names = "brightness", "contrast", "saturation"
    brightness, contrast, saturation = ((0.5 + found[name])[:, None, None, None] for name in names)
    expected = images * brightness
    mean = expected.mean(dim=(1, 2, 3), keepdim=True)
    expected = mean + (expected - mean) * contrast
    grey = expected.mean(dim=1, keepdim=True)
    expected = (grey + (expected - grey) * saturation).clamp(0, 1)
    assert torch.allclose(augment.recolour(images, found, 0.5), expected, atol=1e-6)
