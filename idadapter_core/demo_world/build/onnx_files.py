"""Writes networks as the ONNX files of an insightface package."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from ...files import replacing

OPSET = 13
SMALLEST_HALVED = 64  # values; smaller tensors keep their full precision


def write_onnx(
    network: nn.Module,
    example: Tensor,
    path: Path,
    outputs: Sequence[str],
    free: Mapping[str, Mapping[int, str]] | None = None,
) -> None:
    """Write `network`, in eval mode, with weights in half precision, which the graph casts to float32.

    Args:
        example: an input. The file has its shape, except for the axes in `free`.
        outputs: names of the outputs.
        free: names of the free axes, by axis, for "input" and the outputs.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # about the age of this exporter, which also wrote the common packages
        torch.onnx.export(
            network.eval(),
            (example,),
            buffer,  # type: ignore[arg-type]  # this exporter accepts one, contrary to its annotation
            input_names=["input"],
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in (free or {}).items()},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    _halve(model.graph)
    for node in model.graph.node:
        node.doc_string = ""
    onnx.checker.check_model(model, full_check=True)
    with replacing(path) as file:
        file.write_bytes(model.SerializeToString(deterministic=True))


def _halve(graph: onnx.GraphProto) -> None:
    """Store large weights in half precision, each with a node at the beginning of the graph that casts it to float32."""
    casts = []
    for index, item in enumerate(graph.initializer):
        values = numpy_helper.to_array(item)
        if values.dtype != np.float32 or values.size < SMALLEST_HALVED:
            continue
        name = item.name
        graph.initializer[index].CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(
            helper.make_node(
                "Cast", [f"{name}_half"], [name], name=f"widen_{index}", to=onnx.TensorProto.FLOAT
            )
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
