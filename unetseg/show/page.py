"""A static page that runs networks in the browser: `python -m unetseg page`."""

import functools
import hashlib
import http.server
import json
import shutil
from pathlib import Path

from .. import checkpoint
from ..classes import stored
from ..files import UserError, atomic_open, exclusive, write_json
from ..images import Image
from ..tools.scenes import draw_scene
from .export import export_onnx

SITE = Path(__file__).with_name("site")  # ours, and ONNX Runtime Web 1.23.2 in ort/
STREET = ((1024, 512), (0, 0, 3))  # size and seed of the drawn scene that the page begins with


def make_page(runs_or_weights: list[Path], out: Path) -> str:
    """Write the page with one or more networks to `out`, and return what to do with it. Raises UserError."""
    with exclusive(out):
        there = [path.name for path in out.iterdir() if path.name != ".lock" and path.suffix != ".onnx"]
        if there and "models.json" not in there:
            raise UserError(f"{out}: expected an empty folder or an earlier page, found {min(there)}")
        models = [add_network(given, out, number) for number, given in enumerate(runs_or_weights)]
        for path in set(out.glob("*.onnx")) - {out / model["file"] for model in models}:
            path.unlink()
        write_json(out / "models.json", models)
        with atomic_open(out / "street.jpg") as file:
            Image.fromarray(draw_scene(*STREET)[0]).save(file, "JPEG", quality=92)
        shutil.copytree(SITE, out, dirs_exist_ok=True)
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in (".lock", "offline.js")]
        digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
        worker, names = (SITE / "offline.js").read_text(), ["./", *(str(path.relative_to(out)) for path in files)]
        worker = worker.replace("VERSION", f"unetseg-{digest[:16]}").replace("[]", json.dumps(names), 1)
        (out / "offline.js").write_text(worker)
    size = sum(path.stat().st_size for path in files) / 1e6
    return f"{out}: {len(models)} networks, {size:.1f} MB; put it on any static host, or python -m http.server -d {out}"


def add_network(run_or_weights: Path, out: Path, number: int) -> dict:
    """Export a network to `out`, and say what the page has to know of it."""
    model, about = checkpoint.load_model(run_or_weights)
    name = run_or_weights.resolve().name.removesuffix(".safetensors")
    export_onnx(run_or_weights, out / f"{number}.onnx")
    parameters = sum(weight.numel() for weight in model.parameters())
    size = {"width": about["width"], "height": about["height"]}
    title = f"{name}: {parameters / 1e6:.1f} M parameters, {about['width']}x{about['height']}"
    class_set = stored(about)
    facts = {"names": class_set.names, "colours": class_set.colours.tolist(), "void": about["void"]}
    return {"name": name, "file": f"{number}.onnx", "title": title, **size, **facts}


def serve(folder: Path, port: int) -> None:
    """Serve a page on localhost until interrupted, with the headers that allow several threads."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            super().end_headers()

        def log_message(self, *message: object) -> None:
            """Say nothing."""

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, directory=folder))
    except OSError as error:
        raise UserError(f"port {port} cannot be used: {error.strerror}; name another one") from None
    with server:
        print(f"http://127.0.0.1:{port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
