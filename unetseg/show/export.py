"""A trained network as an ONNX file: `python -m unetseg export`. Needs onnx, onnxscript and onnxruntime."""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import checkpoint
from ..classes import stored
from ..files import UserError, write_bytes

AGREE = 0.999  # share of pixels that must have the same class in PyTorch and in ONNX Runtime


class WholeNetwork(nn.Module):
    """uint8 RGB images (N, H, W, 3) -> logits (N, C, H, W) float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.permute(0, 3, 1, 2).float() / 255)


def export_onnx(run_or_weights: Path, path: Path) -> dict:
    """Write a network as one ONNX file and check it. Returns what its metadata say, and {"difference": of logits,
    "agreement": of classes, "parameters", "bytes"}.

    Its input "image" is (N, H, W, 3) uint8 RGB of any size, best that of training; its output "logits" is (N, C, H, W)
    float32. Filters are stored in 16 bits, which is all that published weights have. The metadata names classes,
    colours, void rule, and the size of training. Raises UserError when ONNX Runtime does not agree with PyTorch.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx uses it)
    except ImportError as error:
        raise UserError(f"export needs {error.name}: pip install onnx onnxscript onnxruntime") from None
    model, about = checkpoint.load_model(run_or_weights)
    for weight in model.parameters():
        weight.data = weight.half().float() if weight.ndim == 4 else weight.data
    network, size = WholeNetwork(model).eval(), (about["height"], about["width"])
    dynamic = {"image": dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)}
    example = torch.zeros(2, *(side + 16 for side in size), 3, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        names = {"input_names": ["image"], "output_names": ["logits"], "dynamic_shapes": dynamic}
        proto = torch.onnx.export(network, (example,), dynamo=True, verbose=False, optimize=False, **names).model_proto
    store_in_16_bits(proto, onnx)
    facts = stored(about).facts() | {"void": about["void"], "width": about["width"], "height": about["height"]}
    facts |= {"weights_sha256": checkpoint.weights_sha256(run_or_weights), "input": "RGB, 0 to 255"}
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in facts.items()})
    encoded = proto.SerializeToString()
    found = compare(network, onnxruntime.InferenceSession(encoded, providers=["CPUExecutionProvider"]), size)
    found |= {"parameters": sum(weight.numel() for weight in model.parameters()), "bytes": len(encoded)}
    if found["agreement"] < AGREE:
        raise UserError(f"{path}: ONNX Runtime and PyTorch agree on {found['agreement']:.2%} of pixels; not written")
    write_bytes(path, encoded)
    return facts | found


def store_in_16_bits(proto: object, onnx: object) -> None:
    """Store the filters of an ONNX model as float16, each followed by a cast."""
    graph = proto.graph
    for tensor in graph.initializer:
        if len(tensor.dims) == 4 and tensor.data_type == onnx.TensorProto.FLOAT:
            name, values = tensor.name, onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, f"{name}_half"))
            graph.node.insert(0, onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))


@torch.inference_mode()
def compare(network: nn.Module, session: object, size: tuple[int, int]) -> dict:
    """The largest difference of logits, and the share of pixels with the same class, on noise of several scales."""
    differences, same, generator = [], [], torch.Generator().manual_seed(0)
    for number, sides in ((2, size), (1, (size[0] + 5, size[1] - 3))):  # both are dynamic
        coarse = torch.rand(number, 3, 8, 8, generator=generator)
        fine = 0.1 * torch.rand(3, *sides, generator=generator)
        images = nn.functional.interpolate(coarse, sides, mode="bilinear") + fine
        images = (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
        ours, theirs = network(images).numpy(), session.run(None, {"image": images.numpy()})[0]
        differences.append(float(np.abs(ours - theirs).max()))
        same.append(float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()))
    return {"difference": max(differences), "agreement": min(same)}
