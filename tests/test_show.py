"""Trained weights for others: predictions of files, ONNX, the page in the browser."""

import asyncio
import base64
import csv
import functools
import http.server
import json
import os
import threading
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from browser import Page, find_browser
from conftest import ROOT, command
from PIL import Image

from unetseg import checkpoint, inference
from unetseg.images import read_photo
from unetseg.show import export
from unetseg.show.predict import Predictor, find_files, legend, predict_files, remarks
from unetseg.tools.scenes import draw_scene

WEIGHTS = ROOT / "weights" / "unet-drawn.safetensors"


@pytest.fixture(scope="module")
def predictor():
    return Predictor(WEIGHTS)


@pytest.fixture(scope="module")
def street():
    """A drawn street of 512x256 that is not among those the weights were trained on."""
    return draw_scene((512, 256), (7, 0, 0))[0]


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


# ---- predict


def test_folders_are_kept_and_what_is_left_out_is_named(tmp_path, street, capsys):
    place = tmp_path / "in put"
    given = "day1/a.png day2/a.jpg straße.jfif a.webp .hidden/a.png two.png two.bmp two.png.png"
    for name in given.split():
        save(place / name, street, format="JPEG" if name.endswith("jfif") else None)
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "b.avif", street)
    (place / "linked").symlink_to(tmp_path / "elsewhere")
    (place / "day1" / "loop").symlink_to(place)
    left_out = {"broken.png": b"no image", "notes.txt": b"hello", "x.heic": b"\0\0\0\x18ftypheic", "cut.mp4": b"x"}
    for name, content in left_out.items():
        (place / name).write_bytes(content)
    for _ in range(2):  # the second time the results are there, too
        assert command("predict", WEIGHTS, place, "--out", place) == 1
        said = capsys.readouterr()
        assert "8 written to" in said.out and "4 left out" in said.out
        assert all(said.err.count(f"{place / name}: ") == 1 for name in left_out) and "HEIC" in said.err
    names = {str(path.relative_to(place / "ids")) for path in (place / "ids").rglob("*.png")}
    wanted = "day1/a.png day2/a.png straße.png a.png linked/b.png two.png.png two.bmp.png two.png.png.png"
    assert names == set(wanted.split())
    ids, shown = (np.array(Image.open(place / name)) for name in ("ids/day1/a.png", "overlay/day1/a.jpg"))
    assert ids.shape == (256, 512) and ids.max() < 7 and shown.shape[0] > 256 and shown.shape[1:] == (512, 3)
    table = csv.DictReader((place / "shares.csv").read_text().splitlines())
    row = next(row for row in table if row["file"].endswith("day1/a.png"))
    assert float(row["road"]) == pytest.approx(np.mean(ids == 1), abs=1e-6)
    facts = json.loads((place / "shares.json").read_text())
    assert len(facts["files"]) == 8 and len(facts["left_out"]) == 4 and facts["classes"][1] == "road"


def test_nothing_written_is_said(tmp_path, capsys):
    Image.new("RGB", (33_554_432, 1)).save(tmp_path / "wide.png")
    assert command("predict", WEIGHTS, tmp_path, tmp_path / "nowhere.png", "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "wide.png: expected sides of at most" in said.err and "nowhere.png: expected a picture" in said.err
    assert said.out == "nothing written, 2 left out\n" and not (tmp_path / "out" / "shares.csv").exists()


def test_a_phones_picture_of_fifty_megapixels_is_turned_upright(tmp_path, predictor, street):
    exif = Image.Exif()
    exif[0x112] = 6  # lies on its side
    large = cv2.resize(street, (8192, 6144))
    save(tmp_path / "phone.jpg", large, exif=exif)
    rows, problems = predict_files(predictor, [tmp_path / "phone.jpg"], tmp_path / "out")
    assert problems == [] and Image.open(tmp_path / "out" / "ids" / "phone.png").size == (6144, 8192)
    assert any("narrower" in said for said in remarks(predictor, rows.values()))


def test_an_animation_is_no_picture(tmp_path, predictor, street):
    save(tmp_path / "still.gif", street)
    save(tmp_path / "moves.gif", street, save_all=True, append_images=[Image.fromarray(street[::-1])])
    rows, problems = predict_files(predictor, [tmp_path], tmp_path / "out")
    assert len(rows) == 1 and "2 pictures in one GIF file" in problems[0]


def test_names_are_below_the_folder_that_all_inputs_share(tmp_path, street):
    for name in ("a/1.png", "b/1.png"):
        save(tmp_path / name, street)
    inputs = [tmp_path / "a" / "1.png", tmp_path / "b", tmp_path / "b" / ".." / "b" / "1.png"]  # one of them twice
    assert list(find_files(inputs, tmp_path / "out")[0].values()) == [os.path.join("a", "1"), os.path.join("b", "1")]
    assert list(find_files(inputs[:1], tmp_path / "out")[0].values()) == ["1"]


def test_a_video_becomes_a_video_and_rows(tmp_path, predictor, street):
    writer = cv2.VideoWriter(str(tmp_path / "drive.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (512, 256))
    for shift in range(5):
        writer.write(np.roll(street, 8 * shift, axis=1)[..., ::-1])
    writer.release()
    rows, problems = predict_files(predictor, [tmp_path / "drive.avi"], tmp_path / "out")
    video = cv2.VideoCapture(str(tmp_path / "out" / "overlay" / "drive.mp4"))
    assert problems == [] and video.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and video.get(cv2.CAP_PROP_FPS) == 10
    frames = list(csv.DictReader((tmp_path / "out" / "frames" / "drive.csv").read_text().splitlines()))
    assert [frame["seconds"] for frame in frames] == ["0.0", "0.1", "0.2", "0.3", "0.4"]
    mean = np.mean([float(frame["road"]) for frame in frames])
    assert rows[str(tmp_path / "drive.avi")]["shares"][1] == pytest.approx(mean, abs=1e-5)


def test_a_name_that_opencv_cannot_take_is_named(tmp_path, predictor):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.avi"))
    path.write_bytes(b"")
    assert "expected a name in UTF-8" in predict_files(predictor, [path], tmp_path / "out")[1][0]


def test_pictures_unlike_those_of_training_are_noted(camvid, predictor, street):
    frames = [read_photo(path) for path in sorted((camvid / "val").glob("*.png"))[::40]]
    like, unlike = ([predictor(image)[1] for image in images] for images in ([street], frames))
    assert remarks(predictor, like) == [] and "unlike the training data" in remarks(predictor, unlike)[0]


def test_predictions_are_the_argmax_of_the_upsampled_logits(street):
    model, about = inference.trained_model(WEIGHTS)
    size = about["width"], about["height"]
    pred = inference.predict(model, street, size)
    small = torch.from_numpy(inference.shrink(street, size)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        both = [model(x).softmax(dim=1) for x in (small, small.flip(-1))]
        large = torch.nn.functional.interpolate(model(small), (256, 512), mode="bilinear", align_corners=False)
        flipped = torch.nn.functional.interpolate((both[0] + both[1].flip(-1)).log(), (256, 512), mode="bilinear")
    assert (pred == large.argmax(dim=1)[0].numpy()).mean() > 0.999
    assert (inference.predict(model, street, size, flip=True) == flipped.argmax(dim=1)[0].numpy()).mean() > 0.999


def test_windows_cover_a_picture_and_agree_with_it():
    """A network that looks at single pixels gives the same in windows, wherever a pixel lies."""
    model = torch.nn.Conv2d(3, 4, 1)
    image = np.random.default_rng(0).integers(0, 256, (3 * 24, 5 * 16, 3), np.uint8)
    for tiles in (2, 3):
        canvas = (32 + (tiles - 1) * 24, 24 + (tiles - 1) * 18)
        resized = inference.shrink(image, canvas)
        whole = inference.predict(model, resized, canvas)
        assert (inference.predict(model, resized, (32, 24), tiles=tiles) == whole).mean() > 0.999


def test_the_legend_names_the_classes_that_occur(predictor):
    one, every = legend(predictor.class_set, 400, [0.0, 1.0, *[0.0] * 5]), legend(predictor.class_set, 400)
    assert one.shape[1:] == every.shape[1:] == (400, 3) and every.shape[0] > one.shape[0] and one.shape[0] % 2 == 0
    assert (one == predictor.class_set.colours[1]).all(axis=-1).any()


# ---- export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "unet.onnx"
    assert command("export", WEIGHTS, "--onnx", path) == 0
    return path


@pytest.mark.parametrize("shape", [(1, 256, 256), (3, 101, 77)])
def test_onnx_runtime_gives_our_logits(exported, shape):
    session = onnxruntime.InferenceSession(exported)
    images = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    model, _ = checkpoint.load_model(WEIGHTS)
    with torch.inference_mode():
        ours = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    np.testing.assert_allclose(session.run(None, {"image": images})[0], ours, atol=1e-3)
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert facts["classes"][4] == "person" and facts["void"] == "ignore" and facts["width"] == 256
    assert exported.stat().st_size < 1.1 * WEIGHTS.stat().st_size  # 16 bits


def test_a_network_that_onnx_runtime_disagrees_with_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "compare", lambda *arguments: {"difference": 1.0, "agreement": 0.99})
    assert command("export", WEIGHTS, "--onnx", tmp_path / "a.onnx") == 1
    assert "99.00%" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- the page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A page with two networks, as a static host serves it."""
    find_browser()
    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unetseg.show.page.export_onnx", functools.cache(export.export_onnx))  # both are the same
        assert command("page", WEIGHTS, WEIGHTS, "--out", out) == 0
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=out)
    handler.func.log_message = lambda *message: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield out, server
    server.shutdown()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "a.onnx").write_bytes(b"mine")
    assert command("page", WEIGHTS, "--out", tmp_path) == 1
    assert "found a.onnx" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_ours_is_short_and_all_is_small(site):
    files = [path for path in site[0].rglob("*") if path.is_file()]
    ours = [path for path in files if path.parent == site[0] and path.suffix in (".html", ".js")]
    assert sum(len(path.read_text().splitlines()) for path in ours) < 300 and len(ours) == 4
    assert sum(path.stat().st_size for path in files) < 30e6 and site[0] / "ort" / "LICENSE" in files


def test_the_browser_predicts_as_python_does(site, tmp_path, street):
    (_, server), url = site, f"http://127.0.0.1:{site[1].server_port}/"
    save(tmp_path / "street.png", street)
    model, about = inference.trained_model(WEIGHTS)
    ours = inference.predict(model, street, (about["width"], about["height"]))
    read = "(async () => new Uint8Array(await new Blob([views[0].result.ids]).arrayBuffer()).toBase64())()"
    idle = "typeof views != 'undefined' && views.length == 2 && document.getElementById('status').textContent == ''"

    async def look():
        async with Page(url, tmp_path / "profile") as page:
            await page.until(f"{idle} && views[0].result")
            await page.choose("#file", tmp_path / "street.png")
            await page.until(f"{idle} && views[0].result && views[0].canvas.width == 512")
            theirs = np.frombuffer(base64.b64decode(await page.run(read)), np.uint8).reshape(256, 512)
            await page.run("document.getElementById('second').value = 1; choose()")
            await page.run("drawing(true)")
            left, top, width, height = await page.run(
                "(({left, top, width, height}) => [left, top, width, height])(views[0].canvas.getBoundingClientRect())"
            )
            corner, opposite = (left + width / 4, top + height / 4), (left + width / 2, top + height * 0.9)
            await page.drag(corner, opposite)
            await page.until(f"{idle} && occluders.length == 1 && views[0].result && views[1].result")
            changed = np.frombuffer(base64.b64decode(await page.run(read)), np.uint8).reshape(256, 512)
            await page.picture(tmp_path / "wide.png")
            await page.resize(390, 844, 2)
            await page.picture(tmp_path / "phone.png")
            wide = await page.run("document.documentElement.scrollWidth")
            await page.until("navigator.serviceWorker.controller")
            server.shutdown()
            server.server_close()
            await page.call("Page.reload")
            await page.until(f"{idle} && views[0].result && crossOriginIsolated")  # without a server
            asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
            return theirs, changed, wide, asked, url

    theirs, changed, wide, asked, url = asyncio.run(look())
    elsewhere = [address for address in asked if not address.startswith((url, "blob:", "data:"))]
    assert (theirs == ours).mean() >= 0.999
    assert (changed[70:220, 140:250] != ours[70:220, 140:250]).mean() > 0.05  # below the occluder
    assert wide <= 390 and not elsewhere
    for name, size in (("wide", (1280, 900)), ("phone", (780, 1688))):
        with Image.open(tmp_path / f"{name}.png") as shot:
            assert shot.size == size and len(shot.convert("RGB").reduce(4).getcolors(10**6)) > 300
