"""Converts an exported IResNet (ONNX) back to weights for our torch module.

Exporters fold every convolution + batch norm pair into one convolution with a bias. The original numbers are lost, but an
identity batch norm that only adds the bias computes the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RecognizerError

BATCH_NORM_EPSILON = 1e-5  # torch's default, as in our module

_PASS_THROUGH = ("Identity", "Dropout", "Flatten", "Reshape")


def iresnet_state_dict_from_onnx(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict (float32) of an `IResNet` that is equivalent to the ONNX file.

    The block counts follow from the graph; the caller checks them.
    Raises RecognizerError if the file is not an ONNX model or its graph is not an IResNet.
    """
    path = Path(path)
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no stubs
    except ImportError as error:
        raise RecognizerError(
            f"reading {path.name} needs the package onnx; run `python -m pip install onnx` with ComfyUI's Python"
        ) from error
    try:
        model = onnx.load(str(path))
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise RecognizerError(
            f"{path.name} ({path.stat().st_size:,} bytes) cannot be read as an ONNX file; it is truncated, damaged or "
            "something else. Download it again."
        ) from error
    return _Walk(path.name, model.graph).run()


class _Walk:
    """Follows the graph from the input to the embedding and collects weights under the names of our module."""

    def __init__(self, name: str, graph: Any) -> None:
        from onnx import numpy_helper

        self.name = name
        self.graph = graph
        self.values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            if node.op_type == "Constant":
                self.values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            elif (
                node.op_type in ("Identity", "Cast") and node.input[0] in self.values
            ):  # Cast: stored in half precision
                self.values[node.output[0]] = self.values[node.input[0]]
            for source in node.input:
                self.consumers[source].append(node)
        self.state: dict[str, Tensor] = {}

    def run(self) -> dict[str, Tensor]:
        inputs = [item.name for item in self.graph.input if item.name not in self.values]
        if len(inputs) != 1:
            raise self.error("the input", "one input tensor", f"{len(inputs)}")
        at = self.convolution(inputs[0], "conv1", "bn1")
        at = self.prelu(at, "prelu")
        stage, index = 0, 0
        while self.starts_block(at):
            if self.next_nodes(at, "Conv"):
                stage, index = stage + 1, 0
            at = self.block(at, f"layer{max(stage, 1)}.{index}")
            index += 1
        at = self.batch_norm(at, "bn2")
        self.head(at)
        return self.state

    def starts_block(self, at: str) -> bool:
        norms = self.next_nodes(at, "BatchNormalization")
        return bool(norms) and bool(self.next_nodes(norms[0].output[0], "Conv"))

    def block(self, at: str, prefix: str) -> str:
        branch = self.batch_norm(at, f"{prefix}.bn1")
        branch = self.convolution(branch, f"{prefix}.conv1", f"{prefix}.bn2")
        branch = self.prelu(branch, f"{prefix}.prelu")
        branch = self.convolution(branch, f"{prefix}.conv2", f"{prefix}.bn3")
        shortcut = at
        if self.next_nodes(at, "Conv"):
            shortcut = self.convolution(at, f"{prefix}.downsample.0", f"{prefix}.downsample.1")
        addition = self.take(branch, "Add", prefix)
        if shortcut not in addition.input:
            raise self.error(prefix, "the sum of both branches", "another sum")
        return str(addition.output[0])

    def head(self, at: str) -> None:
        """Read [Flatten] → fully connected → batch norm. Newer exporters fold the batch norm into the weights."""
        following = self.consumers[at]
        while following and following[0].op_type in _PASS_THROUGH:
            following = self.consumers[following[0].output[0]]
        if not following or following[0].op_type != "Gemm":
            raise self.error("bn2", "Gemm", _ops(following))
        gemm = following[0]
        attributes = {item.name: item for item in gemm.attribute}
        weight = self.value(gemm.input[1], "fc")
        transposed = "transB" in attributes and attributes["transB"].i == 1
        self.put("fc.weight", weight if transposed else weight.T)
        self.put("fc.bias", self.value(gemm.input[2], "fc"))
        if self.next_nodes(gemm.output[0], "BatchNormalization"):
            self.batch_norm(gemm.output[0], "features")
        else:
            self.identity_norm("features", np.zeros(weight.shape[0 if transposed else 1], np.float32))

    def convolution(self, at: str, name: str, norm: str) -> str:
        node = self.take(at, "Conv", name)
        self.put(f"{name}.weight", self.value(node.input[1], name))
        if len(node.input) < 3:
            return self.batch_norm(node.output[0], norm)
        self.identity_norm(norm, self.value(node.input[2], name))
        return str(node.output[0])

    def batch_norm(self, at: str, name: str) -> str:
        node = self.take(at, "BatchNormalization", name)
        weight, bias, mean, variance = (self.value(source, name) for source in node.input[1:5])
        epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), 1e-5)
        self.put(f"{name}.weight", weight)
        self.put(f"{name}.bias", bias)
        self.put(f"{name}.running_mean", mean)
        self.put(f"{name}.running_var", variance + np.float32(epsilon - BATCH_NORM_EPSILON))
        return str(node.output[0])

    def identity_norm(self, name: str, bias: np.ndarray) -> None:
        self.put(f"{name}.weight", np.ones_like(bias))
        self.put(f"{name}.bias", bias)
        self.put(f"{name}.running_mean", np.zeros_like(bias))
        self.put(f"{name}.running_var", np.full_like(bias, 1 - BATCH_NORM_EPSILON))

    def prelu(self, at: str, name: str) -> str:
        node = self.take(at, "PRelu", name)
        self.put(f"{name}.weight", self.value(node.input[1], name).reshape(-1))
        return str(node.output[0])

    def next_nodes(self, at: str, op: str) -> list[Any]:
        return [node for node in self.consumers[at] if node.op_type == op]

    def take(self, at: str, op: str, where: str) -> Any:
        nodes = self.next_nodes(at, op)
        if not nodes:
            raise self.error(where, op, _ops(self.consumers[at]))
        return nodes[0]

    def value(self, source: str, where: str) -> np.ndarray:
        if source not in self.values:
            raise self.error(where, "stored weights", f"the computed tensor '{source}'")
        return np.asarray(self.values[source])

    def put(self, key: str, value: np.ndarray) -> None:
        self.state[key] = torch.from_numpy(np.array(value, dtype=np.float32, order="C"))

    def error(self, where: str, wanted: str, found: str) -> RecognizerError:
        return RecognizerError(
            f"{self.name} is an ONNX model, but not an IResNet: at {where} expected {wanted}, found {found}. "
            "UniID needs the IResNet-100 of arcface_torch (glintr100.onnx of antelopev2 has this form)."
        )


def _ops(nodes: Sequence[Any]) -> str:
    return ", ".join(node.op_type for node in nodes) or "the end of the graph"
