"""A face detector as expensive as those of insightface's packages: the layers of SCRFD-10G as an ONNX file, with random weights.

It finds no faces; the published weights are not needed to time a call.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.tiny.face_package import Graph

STAGES = ((56, 3), (88, 4), (88, 2), (224, 3))
"""Width and number of residual blocks of each stage; the outputs of the last three have strides 8, 16 and 32."""
NECK, HEAD = 56, 80
_ANCHORS = 2
_OUTPUTS = (("scores", 1), ("boxes", 4), ("landmarks", 10))


class _Network:
    """Builds a graph of convolutions with random weights."""

    def __init__(self) -> None:
        self.graph = Graph()
        self._rng = np.random.default_rng(0)

    def conv(self, x: str, into: int, width: int, stride: int = 1, side: int = 3, output: str = "") -> str:
        kernel = self._rng.standard_normal((width, into, side, side), dtype=np.float32)
        kernel /= np.float32((into * side * side) ** 0.5)
        pad = side // 2
        return self.graph.add(
            "Conv",
            x,
            kernel,
            np.zeros(width, np.float32),
            output=output,
            strides=[stride, stride],
            pads=[pad] * 4,
        )

    def relu(self, x: str) -> str:
        return self.graph.add("Relu", x)

    def block(self, x: str, into: int, width: int, stride: int) -> str:
        inner = self.conv(self.relu(self.conv(x, into, width, stride)), width, width)
        beside = x if (into, stride) == (width, 1) else self.conv(x, into, width, stride, side=1)
        return self.relu(self.graph.add("Add", inner, beside))

    def up(self, x: str) -> str:
        scales = self.graph.constant([1.0, 1.0, 2.0, 2.0])
        return self.graph.add("Resize", x, "", scales, mode="nearest")


def write_detector(path: Path, side: int = 640, divide: int = 1) -> Path:
    """Write the detector for images (1, 3, side, side). `divide`: divisor of all widths, for trials."""
    net = _Network()
    stages = [(width // divide, blocks) for width, blocks in STAGES]
    neck, head = NECK // divide, HEAD // divide
    width = stages[0][0]
    x = net.relu(net.conv("input", 3, width // 2, 2))
    x = net.relu(net.conv(x, width // 2, width // 2))
    x = net.relu(net.conv(x, width // 2, width))
    x = net.graph.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    levels = []
    for number, (wide, blocks) in enumerate(stages):
        for block in range(blocks):
            x = net.block(x, width, wide, 2 if number and not block else 1)
            width = wide
        levels.append((x, wide))
    results = {}
    for level, top in enumerate(_pyramid(net, levels[1:], neck)):
        y, into = top, neck
        for _ in range(3):
            y, into = net.relu(net.conv(y, into, head)), head
        here = side // (8 << level)
        for name, count in _OUTPUTS:
            output = f"{name}_{8 << level}"
            net.conv(y, into, _ANCHORS * count, output=output)
            results[output] = [1, _ANCHORS * count, here, here]
    return net.graph.save(path, ("input", [1, 3, side, side]), results)


def _pyramid(net: _Network, levels: list[tuple[str, int]], neck: int) -> list[str]:
    """Features of all strides: top-down, then bottom-up."""
    lateral = [net.conv(x, width, neck, side=1) for x, width in levels]
    for level in (1, 0):
        lateral[level] = net.graph.add("Add", lateral[level], net.up(lateral[level + 1]))
    found = [net.conv(x, neck, neck) for x in lateral]
    for level in (1, 2):
        found[level] = net.graph.add("Add", found[level], net.conv(found[level - 1], neck, neck, 2))
    return [found[0], *(net.conv(x, neck, neck) for x in found[1:])]
