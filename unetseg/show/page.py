"""A static page that runs networks in the browser: `python -m unetseg page`."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
from pathlib import Path

from .. import checkpoint
from ..files import UserError, exclusive, make_folder, read_bytes, write_bytes
from ..images import Image
from ..tools.scenes import draw_scene
from .export import export_onnx

SITE = Path(__file__).with_name("site")  # ours, and ONNX Runtime Web 1.23.2 in ort/
STREET = ((1024, 512), (0, 0, 3))  # size and seed of the drawn scene that the page begins with


def make_page(runs_or_weights: list[Path], out: Path) -> str:
    """Write the page with one or more networks to `out`, and return what to do with it. Raises UserError."""
    there = {path.name for path in out.glob("*")} - {".lock"}
    if there and "models.json" not in there:
        raise UserError(f"{out}: expected an empty folder or an earlier page, found {min(there)}")
    with exclusive(out):
        earlier = json.loads(read_bytes(out / "models.json")) if there else []
        street = io.BytesIO()
        Image.fromarray(draw_scene(*STREET)[0]).save(street, "JPEG", quality=92)
        ours = [path for path in SITE.rglob("*") if path.is_file()]
        contents = {str(path.relative_to(SITE)): path.read_bytes() for path in ours}
        write_bytes(out / "models.json", b"[]")  # marks the folder as ours
        models = [add_network(given, out) for given in runs_or_weights]
        contents |= {model["file"]: read_bytes(out / model["file"]) for model in models}
        contents |= {"street.jpg": street.getvalue(), "models.json": json.dumps(models, indent=1).encode()}
        version = hashlib.sha256(b"".join(contents[name] for name in sorted(contents)))
        names = json.dumps(["./", *sorted(contents.keys() - {"offline.js"})])
        worker = contents["offline.js"].decode().replace("VERSION", version.hexdigest()[:16]).replace("[]", names, 1)
        for name, content in (contents | {"offline.js": worker.encode()}).items():
            write_bytes(make_folder((out / name).parent) / Path(name).name, content)
        for name in {model["file"] for model in earlier} - contents.keys():
            (out / name).unlink(missing_ok=True)
    size = sum(map(len, contents.values())) / 1e6
    return f"{out}: networks: {len(models)}, {size:.1f} MB; for any static host, or python -m http.server -d {out}"


def add_network(run_or_weights: Path, out: Path) -> dict:
    """Export a network to `out`, and say what the page has to know of it."""
    path = run_or_weights.resolve()
    name = path.name.removesuffix(".safetensors") if path.is_file() else f"{path.parent.name}/{path.name}"
    file = f"{checkpoint.weights_sha256(run_or_weights)[:12]}.onnx"
    facts = export_onnx(run_or_weights, out / file)
    size = {"width": facts["width"], "height": facts["height"]}
    title = f"{name}: {facts['parameters'] / 1e6:.1f} M parameters, {facts['width']}x{facts['height']}"
    return {"name": name, "file": file, "title": title, "names": facts["classes"], "colours": facts["colours"], **size}


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
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
