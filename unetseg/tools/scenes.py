"""Drawn street scenes in the Cityscapes layout, for users without data: seen from a car, labelled to the pixel.

A pinhole camera 1.4 m above the road looks along it. Points are in metres: x to the right, y up, z ahead. Near objects
are painted last, so they occlude what is behind them. Labels are Cityscapes' label ids; same seed, same bytes.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import UserError, atomic_open, make_folder
from ..images import cv2
from .workers import worker_pool

EGO, BORDER, ROAD, SIDEWALK, BUILDING, WALL, FENCE = 1, 2, 7, 8, 11, 12, 13
POLE, LIGHT, SIGN, TREE, GRASS, SKY, PERSON, RIDER = 17, 19, 20, 21, 22, 23, 24, 25
CAR, TRUCK, BUS, BICYCLE = 26, 27, 28, 33
EYE, FAR = 1.4, 100.0  # metres: the camera's height, the end of the street
PAINTS = [(40, 42, 50), (185, 187, 192), (120, 24, 28), (28, 46, 98), (222, 222, 222), (62, 78, 62), (90, 92, 96)]
FACADES = [(176, 160, 140), (150, 105, 85), (200, 190, 170), (122, 120, 118), (186, 150, 110), (140, 140, 150)]
SKIN = [(224, 180, 150), (160, 115, 85), (95, 65, 50)]


class Canvas:
    """An image and its labels, painted together."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        self.width, self.height = size
        self.image = np.zeros((self.height, self.width, 3), np.uint8)
        self.labels = np.full((self.height, self.width), SKY, np.uint8)
        self.focal = 0.45 * (self.width + self.height * 2)
        self.horizon = self.height * rng.uniform(0.40, 0.46)
        self.x = rng.uniform(-0.4, 1.0)  # of the camera
        self.haze = np.array([205, 212, 220]) * rng.uniform(0.75, 1.0)
        self.sun_left = rng.random() < 0.5

    def project(self, points: list) -> np.ndarray:
        """Points in metres (n, 3) -> 1/16 pixels (n, 2)."""
        x, y, z = np.array(points, float).T
        scale = self.focal / np.maximum(z, 0.8)
        uv = np.stack([self.width / 2 + (x - self.x) * scale, self.horizon + (EYE - y) * scale], axis=1)
        return np.round(np.clip(uv, -9000, 9000) * 16).astype(np.int32)

    def shade(self, colour: np.ndarray, z: float) -> list[float]:
        """A colour as it looks from afar: it fades into the haze."""
        fade = 1 - np.exp(-z / 150)
        return np.clip(np.asarray(colour) * (1 - fade) + self.haze * fade, 0, 255).tolist()

    def polygon(self, points: list, colour: np.ndarray, label: int | None) -> None:
        """Fill a polygon; without a label (a shadow, a marking's paint) the labels stay."""
        corners = self.project(points)
        cv2.fillPoly(self.image, [corners], self.shade(colour, points[0][2]), cv2.LINE_AA, 4)
        if label is not None:
            cv2.fillPoly(self.labels, [corners], int(label), shift=4)

    def disc(self, x: float, y: float, z: float, wide: float, high: float, colour, label: int | None) -> None:
        """Fill an upright ellipse with half-axes in metres."""
        turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        self.polygon([(x + wide * c, y + high * s, z) for c, s in zip(np.cos(turn), np.sin(turn))], colour, label)

    def front(self, x0, x1, y0, y1, z, colour, label) -> None:
        """Fill an upright rectangle that faces the camera."""
        self.polygon([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], colour, label)

    def side(self, x, y0, y1, z0, z1, colour, label) -> None:
        """Fill an upright rectangle along the road."""
        self.polygon([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], colour, label)

    def ground(self, x0, x1, z0, z1, colour, label, y=0.0) -> None:
        """Fill a level rectangle."""
        self.polygon([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], colour, label)

    def box(self, x0, x1, y0, y1, z0, z1, colour, label) -> None:
        """Paint the faces of a box that the camera can see."""
        if self.x < x0:
            self.side(x0, y0, y1, z0, z1, colour * (1.0 if self.sun_left else 0.7), label)
        if self.x > x1:
            self.side(x1, y0, y1, z0, z1, colour * (0.7 if self.sun_left else 1.0), label)
        if y1 < EYE:
            self.ground(x0, x1, z0, z1, colour * 1.1, label, y1)
        self.front(x0, x1, y0, y1, z0, colour * 0.85, label)


def car(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A car, or now and then a truck or a bus, seen from behind or from the front."""
    kind = rng.choice([CAR, TRUCK, BUS], p=[0.95, 0.03, 0.02])
    wide, high, length = {CAR: (1.8, 1.45, 4.3), TRUCK: (2.4, 3.2, 7.0), BUS: (2.5, 3.0, 11.0)}[kind]
    x0, x1, belt = x - wide / 2, x + wide / 2, 0.9 if kind == CAR else high * 0.55
    paint, glass = rng.choice(PAINTS) * rng.uniform(0.8, 1.1), np.array([35, 42, 50])
    canvas.ground(x0 - 0.25, x1 + 0.25, z - 0.2, z + length, (42, 42, 44), None)
    for wheel in (z + 0.7, z + length - 0.8):
        for edge in (x0, x1):
            canvas.side(edge, 0.0, 0.62, wheel - 0.32, wheel + 0.32, (18, 18, 20), kind)
    canvas.box(x0, x1, 0.28, belt, z, z + length, paint, kind)
    inset, front, pane = (0.14, 0.35, 0.3) if kind == CAR else (0.02, 0, -0.02)
    canvas.box(x0 + inset, x1 - inset, belt, high, z + front, z + length * 0.78, glass * 1.5, kind)
    canvas.front(x0 + inset + 0.1, x1 - inset - 0.1, belt + 0.06, high - 0.12, z + pane, glass, kind)
    canvas.ground(x0 + inset, x1 - inset, z + 0.5, z + length * 0.75, paint, kind, high)
    lamps = (190, 25, 25) if rng.random() < 0.6 else (240, 240, 225)
    for edge in (x0 + 0.08, x1 - 0.4):
        canvas.front(edge, edge + 0.32, 0.62, 0.78, z - 0.02, lamps, kind)
    canvas.front(x - 0.26, x + 0.26, 0.42, 0.54, z - 0.02, (225, 225, 215), kind)
    for edge in (x0 + 0.12, x1 - 0.37):
        canvas.front(edge, edge + 0.25, 0.0, 0.3, z, (18, 18, 20), kind)


def person(canvas: Canvas, rng: np.random.Generator, x: float, z: float, label: int = PERSON, lift=0.0) -> None:
    """Someone standing, walking, or (lifted onto a bicycle) riding."""
    size, stride = rng.uniform(0.85, 1.05), rng.uniform(0.02, 0.24)
    coat, trousers, skin = rng.choice(PAINTS), rng.choice(PAINTS) * 0.7, rng.choice(SKIN)
    hip, neck = lift + 0.85 * size, lift + 1.48 * size
    for step in (-stride, stride):
        legs = [(x - 0.14, hip, z), (x + 0.14, hip, z), (x + step + 0.1, lift, z), (x + step - 0.08, lift, z)]
        canvas.polygon(legs, trousers * (1.0 if step > 0 else 0.8), label)
    torso = [(x - 0.17, hip, z), (x + 0.17, hip, z), (x + 0.25, neck - 0.1, z), (x, neck, z), (x - 0.25, neck - 0.1, z)]
    for step in (-stride, stride):
        arm = x + np.sign(step) * 0.24
        shoulder = [(arm - 0.05, neck - 0.1, z), (arm + 0.05, neck - 0.1, z)]
        canvas.polygon([*shoulder, (arm + step + 0.04, hip, z), (arm + step - 0.04, hip, z)], coat * 0.85, label)
    canvas.polygon(torso, coat, label)
    canvas.disc(x, neck + 0.13, z, 0.1, 0.14, skin, label)
    canvas.disc(x, neck + 0.2, z, 0.1, 0.08, rng.choice(SKIN) * 0.4, label)


def rider(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A bicycle seen along the road, with someone on it."""
    for place in (z + 1.0, z):
        canvas.disc(x, 0.34, place, 0.05, 0.34, (25, 25, 28), BICYCLE)
    canvas.front(x - 0.28, x + 0.28, 0.95, 1.0, z + 0.8, (60, 60, 64), BICYCLE)
    canvas.front(x - 0.03, x + 0.03, 0.4, 0.9, z + 0.3, rng.choice(PAINTS), BICYCLE)
    person(canvas, rng, x, z + 0.2, RIDER, lift=0.28)


def tree(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A trunk under a crown of many leaves' clusters, lit from above."""
    height, radius, green = rng.uniform(4.2, 7.0), rng.uniform(1.5, 2.7), rng.uniform([45, 75, 25], [95, 120, 50])
    canvas.front(x - 0.14, x + 0.14, 0.0, height, z, (78, 62, 48), TREE)
    for turn, reach in zip(rng.uniform(0, 2 * np.pi, 46), radius * np.sqrt(rng.random(46))):
        lit = 0.7 + 0.35 * np.sin(turn) * reach / radius + rng.uniform(-0.15, 0.2)
        spot = x + reach * np.cos(turn), height + 0.5 + 0.85 * reach * np.sin(turn)
        canvas.disc(*spot, z, *rng.uniform(0.3, 0.65, 2), green * lit, TREE)


def sign(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A pole that carries a traffic sign, a traffic light, or a lamp."""
    kind, high = rng.integers(3), rng.uniform(2.6, 3.4)
    canvas.front(x - 0.06, x + 0.06, 0, 6.5 if kind == 2 else high, z, (105, 108, 110), POLE)
    if kind == 0:
        colour = np.array([(200, 30, 35), (30, 70, 170), (235, 200, 30)])[rng.integers(3)]
        canvas.disc(x, high, z, 0.34, 0.34, colour, SIGN)
        canvas.front(x - 0.2, x + 0.2, high - 0.08, high + 0.08, z, (235, 235, 235), SIGN)
    elif kind == 1:
        canvas.front(x - 0.18, x + 0.18, high - 0.5, high + 0.5, z, (30, 32, 32), LIGHT)
        on = rng.integers(3)
        for place, colour in enumerate([(60, 200, 90), (240, 190, 50), (230, 50, 45)]):
            glow = colour if place == on else (60, 60, 60)
            canvas.disc(x, high - 0.32 + 0.32 * place, z, 0.11, 0.11, glow, LIGHT)


def building(canvas: Canvas, rng: np.random.Generator, x: float, z0: float, z1: float) -> None:
    """A house whose front, with its windows, stands along the pavement; x is the side of the street it stands on."""
    high, facade = rng.uniform(9, 23), rng.choice(FACADES) * rng.uniform(0.7, 1.1)
    canvas.box(min(x, 5 * x), max(x, 5 * x), 0, high, z0, z1, facade, BUILDING)
    dim = 0.7 if canvas.sun_left == (x < 0) else 1.0
    canvas.side(x, 0, 0.7, z0, z1, facade * 0.6 * dim, BUILDING)
    floors, columns = int(high / 3.1), max(1, int((z1 - z0) / 2.6))
    for floor, column in np.ndindex(floors, columns):
        left = z0 + (column + 0.25) * (z1 - z0) / columns
        tall, wide = (2.1, 1.7) if floor == 0 else (1.6, 1.2)
        glass = np.array([70, 82, 95]) * rng.uniform(0.5, 1.5) * dim
        sill, lintel, frame = 3.1 * floor + 0.75, 3.1 * floor + 0.85 + tall, facade * 1.15 * dim
        canvas.side(x, sill, lintel, left - 0.1, left + wide + 0.1, frame, BUILDING)
        canvas.side(x, sill + 0.1, lintel - 0.1, left, left + wide, glass, BUILDING)


def row_of_houses(canvas: Canvas, rng: np.random.Generator, x: float) -> None:
    """Houses along one side, with gaps that show a wall, a fence or a hedge; far ones first."""
    edges = [rng.uniform(-4, 4)]
    while edges[-1] < FAR:
        edges.append(edges[-1] + rng.uniform(8, 20))
    for z0, z1 in reversed(list(pairwise(edges))):
        if rng.random() < 0.68:
            building(canvas, rng, x, max(z0, 1.0), z1)
            continue
        kind, colour = ((WALL, (150, 140, 130)), (FENCE, (110, 90, 70)), (TREE, (60, 90, 40)))[rng.integers(3)]
        for _ in range(5):
            tree(canvas, rng, x * rng.uniform(1.2, 1.9), max(rng.uniform(z0, z1), 2.0))
        canvas.side(x, 0, rng.uniform(1.0, 2.0), max(z0, 1.0), z1, colour, kind)


def street(canvas: Canvas, rng: np.random.Generator) -> tuple[float, float, float]:
    """Sky, ground and road with its markings; returns the left kerb, the right kerb and the pavement's width."""
    top, low = np.array([95, 140, 200]) * rng.uniform(0.8, 1.2), canvas.haze
    ramp = np.linspace(0, 1, canvas.height)[:, None, None] ** 0.7
    canvas.image[:] = np.clip(top * (1 - ramp) + low * ramp, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 9)):
        x, y, wide, high = (rng.uniform(*ends) for ends in ((-90, 90), (25, 80), (5, 25), (1, 4)))
        canvas.disc(x, y, 130, wide, high, low * 1.1, SKY)
    left, right, pavement = -rng.uniform(3.2, 7.5), rng.uniform(3.0, 6.0), rng.uniform(2.0, 4.2)
    asphalt = np.array([98, 98, 102]) * rng.uniform(0.7, 1.15)
    canvas.ground(-400, 400, 0.8, 400, (105, 120, 80), GRASS)
    for z0, z1 in zip((400, 40, 15), (40, 15, 0.8)):  # in strips, so that the haze grows with distance
        canvas.ground(left - pavement, right + pavement, z1, z0, (150, 145, 140), SIDEWALK)
        canvas.ground(left, right, z1, z0, asphalt, ROAD)
        for kerb in (left, right):
            canvas.ground(kerb - 0.12, kerb + 0.12, z1, z0, (175, 172, 168), SIDEWALK)
    white = np.array([215, 215, 210])
    for z in np.arange(60, 2, -6.0):
        middle = (left + right) / 2 - 0.8
        canvas.ground(middle - 0.07, middle + 0.07, z, z + 3, white, ROAD)
    if rng.random() < 0.35:
        z = rng.uniform(9, 25)
        for x in np.arange(left + 0.4, right - 0.6, 1.0):
            canvas.ground(x, x + 0.5, z, z + 3, white, ROAD)
    for _ in range(rng.integers(2, 7)):  # patches and wet places in the asphalt
        x, z = rng.uniform(left, right - 1), rng.uniform(4, 25)
        wide, deep = min(x + rng.uniform(0.5, 3), right), z + rng.uniform(1, 6)
        canvas.ground(x, wide, z, deep, asphalt * rng.uniform(0.8, 1.1), ROAD)
    return left, right, pavement


def things(rng: np.random.Generator, left: float, right: float, pavement: float) -> list[tuple]:
    """What stands and moves in the street: (painter, x, z), the far ones first."""

    def beside() -> float:
        return rng.choice([left - rng.uniform(0.4, pavement), right + rng.uniform(0.4, pavement)])

    edges = [left - pavement * 0.8, right + pavement * 0.8]
    found = [(tree, rng.choice(edges), z) for z in rng.uniform(9, 75, rng.integers(6, 17))]
    found += [(sign, rng.choice([left - 0.4, right + 0.4]), z) for z in rng.uniform(7, 50, rng.integers(4, 10))]
    for kerb in (left + 1.1, right - 1.1):  # parked along the kerbs
        if rng.random() < 0.7:
            found += [(car, kerb, z) for z in np.arange(rng.uniform(6, 15), 70, 6.0) if rng.random() < 0.6]
    found += [(car, rng.uniform(left + 1.2, right - 1.2), z) for z in rng.uniform(11, 70, rng.integers(1, 7))]
    found += [(person, beside(), z) for z in rng.uniform(4, 15, rng.integers(5, 12))]
    found += [(person, rng.uniform(left, right), z) for z in rng.uniform(5, 14, rng.integers(1, 5))]
    found += [(rider, rng.uniform(left + 0.5, right - 0.5), z) for z in rng.uniform(5, 14, rng.integers(0, 3))]
    return sorted(found, key=lambda thing: -thing[2])


def camera(canvas: Canvas, rng: np.random.Generator) -> None:
    """What the camera adds: the car's own hood, the border of rectification, light, colour, texture, noise."""
    height, width = canvas.labels.shape
    rise, across = height * rng.uniform(0.08, 0.13), np.linspace(-1, 1, width)
    top = height - rise * np.sqrt(np.clip(1 - (across / 1.12) ** 4, 0, 1))
    rows = np.arange(height)[:, None]
    hood = rows >= top
    canvas.image[hood] = (np.array([58, 62, 68]) * (1.5 - (rows - top) / rise)[hood][:, None]).clip(0, 255)
    canvas.labels[hood] = EGO
    picture = canvas.image.astype(np.float32)
    for cells, strength in ((6, 0.05), (128, 0.025)):
        coarse = rng.standard_normal((cells, 2 * cells)).astype(np.float32)
        picture *= 1 + strength * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
    picture = (picture * rng.uniform(0.92, 1.08, 3) * rng.uniform(0.75, 1.3) + rng.uniform(-8, 12)).astype(np.float32)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 0.8) * width / 1024)
    picture += rng.standard_normal(picture.shape).astype(np.float32) * rng.uniform(3, 8)
    canvas.image = picture.clip(0, 255).astype(np.uint8)
    edge = max(1, width // 200)
    for strip in (np.s_[:edge], np.s_[-edge:], np.s_[:, :edge], np.s_[:, -edge:]):
        canvas.image[strip], canvas.labels[strip] = 0, BORDER


def draw_scene(size: tuple[int, int], seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One street of `size` (width, height): RGB (H, W, 3) uint8 and label ids (H, W) uint8; same seed, same bytes."""
    rng = np.random.default_rng(seed)
    canvas = Canvas(size, rng)
    left, right, pavement = street(canvas, rng)
    if rng.random() < 0.6:
        canvas.front(-60, 60, 0, rng.uniform(10, 19), FAR, rng.choice(FACADES), BUILDING)
    else:
        for x in np.arange(-30, 30, 3.0):
            tree(canvas, rng, x, FAR)
    for x in (left - pavement, right + pavement):
        row_of_houses(canvas, rng, x)
    for painter, x, z in things(rng, left, right, pavement):
        painter(canvas, rng, x, z)
    camera(canvas, rng)
    return canvas.image, canvas.labels


def draw_dataset(out: Path, num_scenes: dict[str, int], size: tuple[int, int] = (1024, 512), seed: int = 0) -> int:
    """Write scenes under `out` as leftImg8bit/<split>/drawn and gtFine/<split>/drawn; returns how many were new.

    num_scenes  split name -> number of scenes; scene i of a split depends on (seed, split, i) alone
    Raises UserError where scenes of another seed or size lie.
    """
    if min(size) < 64:
        raise UserError(f"scenes: expected at least 64 pixels a side, found {size[0]}x{size[1]}")
    for path in out.glob("gtFine/*/drawn/*.png"):
        try:
            there = Image.open(path).size
        except OSError:
            raise UserError(f"{path}: expected a drawn scene, found a damaged file; delete it") from None
        if there != size or not path.name.startswith(f"drawn_{seed:06d}_"):
            found, wanted = f"{path.name} of {there[0]}x{there[1]}", f"scenes of seed {seed}, {size[0]}x{size[1]}"
            raise UserError(f"{out}: expected {wanted}, found {found}; use another folder")
    jobs = []
    for number, (split, count) in enumerate(num_scenes.items()):
        for place in range(count):
            stem = f"drawn_{seed:06d}_{place:06d}"
            image_path = out / "leftImg8bit" / split / "drawn" / f"{stem}_leftImg8bit.png"
            labels_path = out / "gtFine" / split / "drawn" / f"{stem}_gtFine_labelIds.png"
            if not (image_path.is_file() and labels_path.is_file()):
                jobs.append((size, (seed, number, place), image_path, labels_path))
    if jobs:
        with worker_pool() as pool:
            list(tqdm(pool.map(_draw_files, jobs), total=len(jobs), desc="drawing", unit="img"))
    return len(jobs)


def _draw_files(job: tuple) -> None:
    size, seed, *paths = job
    cv2.setNumThreads(1)
    for path, picture in zip(paths, draw_scene(size, seed)):
        make_folder(path.parent)
        with atomic_open(path) as file:
            Image.fromarray(picture).save(file, format="PNG", compress_level=3)
