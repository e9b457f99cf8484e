"""A tiny insightface package that really runs, and photos whose faces it finds.

Real face models cannot be shipped, so these stand in for them: five ONNX files (about 400 kB) of the shapes that
insightface routes by, built node by node without training. What they see is a "marked face": five dots in saturated
colours where eyes, nose and mouth corners are. `synthesize` draws such faces, `paint` puts the dots on any photo.

What the models answer can be chosen by what is drawn:

- detection: all five dots, each in one piece and at least 3 px large at the detector's scale, on an upright face. Faces
  too large for the detector's window are found at a smaller size only. The blue of the nose is the score. An extra
  cyan dot makes the landmarks NaN. No dot colour becomes another one when red and blue are swapped, so a photo in the
  wrong channel order has no face.
- recognition: a random projection of the crop, which tells `identity` patterns apart.
- sex and age: male where the face has more red than blue; age 50 + 50 times the green level (in -1..1).
- 3D and 2D landmarks: the same points for every face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from idadapter_core.faces.align import similarity_transform

# Left and right eye as seen in the image, nose, left and right mouth corner: insightface's order. RGB.
DOT_COLORS = ((255, 255, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255), (255, 0, 0))
NAN_COLOR = (0, 255, 255)
NOSE = 2
CHANNELS = len(DOT_COLORS) + 2  # dots, the NaN dot, and the nose dot weighted by its blue level
NAN_CHANNEL, LEVEL_CHANNEL = 5, 6
FILES = {
    "buffalo_l": ("det_10g.onnx", "w600k_r50.onnx"),
    "antelopev2": ("scrfd_10g_bnkps.onnx", "glintr100.onnx"),
}
OPSET, IR_VERSION = 13, 8
STEEP = 1e4  # slope of the soft comparisons below
_PIXEL_AREA = 3.0  # a dot must cover this many pixels


# ------------------------------------------------------------------------------------------------ building graphs


class Graph:
    """Adds ONNX nodes one call at a time. Operands are tensor names, numbers or arrays."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def constant(self, value: float | Sequence[int] | np.ndarray, dtype: type = np.float32) -> str:
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"constant{len(self.constants)}")
        return self.constants[key].name

    def add(
        self, op: str, *operands: str | float | np.ndarray, output: str = "", **attributes: object
    ) -> str:
        inputs = [item if isinstance(item, str) else self.constant(item) for item in operands]
        # insightface guesses the input range from node names that begin with Sub or Mul: begin with something else.
        name = f"node{len(self.nodes)}_{op}"
        output = output or f"{name}_out"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def channel(self, source: str, index: int) -> str:
        ends = (self.constant([i], np.int64) for i in (index, index + 1, 1))
        return self.add("Slice", source, *ends)

    def reshape(self, source: str, shape: Sequence[int], output: str = "") -> str:
        return self.add("Reshape", source, self.constant(shape, np.int64), output=output)

    def clip01(self, source: str) -> str:
        return self.add("Clip", source, 0.0, 1.0)

    def greater(self, left: str | float, right: str | float) -> str:
        """1 where left > right, 0 where it is smaller."""
        return self.clip01(self.add("Mul", self.add("Sub", left, right), STEEP))

    def product(self, factors: Sequence[str]) -> str:
        result = factors[0]
        for factor in factors[1:]:
            result = self.add("Mul", result, factor)
        return result

    def middle(self, left: str, right: str) -> str:
        return self.add("Mul", self.add("Add", left, right), 0.5)

    def save(
        self, path: Path, source: tuple[str, Sequence[object]], results: Mapping[str, Sequence[object]]
    ) -> Path:
        def info(name: str, shape: Sequence[object]) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [info(*source)],
            [info(name, shape) for name, shape in results.items()],
            list(self.constants.values()),
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="tiny")
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString())
        return path


@dataclass(frozen=True)
class Blob:
    """A dot seen from one place: its area and centre (offsets from there), and its spread."""

    mass: str
    x: str
    y: str
    variance: str


def _color_masks(graph: Graph, rgb: str) -> str:
    """RGB in about -1..1 to masks (1, CHANNELS, H, W): 1 where a pixel has the colour of a dot."""
    weights, biases = [], []
    for index, color in enumerate((*DOT_COLORS, NAN_COLOR)):
        signs = [1.0 if level else -1.0 for level in color]
        threshold = 1.6 if index == NOSE else 2.2  # the nose's blue may be lower: it carries the score
        weights.append([4 * sign for sign in signs])
        biases.append(-4 * threshold)
    kernel = np.array(weights, np.float32).reshape(-1, 3, 1, 1)
    masks = graph.clip01(graph.add("Conv", rgb, kernel, np.array(biases, np.float32)))
    blue = np.array([0, 0, 0.5], np.float32).reshape(1, 3, 1, 1)
    level = graph.add("Conv", rgb, blue, np.array([0.5], np.float32))
    return graph.add("Concat", masks, graph.add("Mul", graph.channel(masks, NOSE), level), axis=1)


def _moments(
    graph: Graph, masks: str, window: int, stride: int, padding: tuple[int, int]
) -> list[tuple[str, str, str, str]]:
    """Per channel the sums of 1, x, y and x² + y² over a window around each place, in multiples of `stride` cells.

    Two one-dimensional convolutions: along x for 1, x, x², then along y.
    """
    t = ((np.arange(window) - window / 2 + 0.5) / stride).astype(np.float32)
    one = np.ones_like(t)
    along_x = np.zeros((CHANNELS * 3, 1, 1, window), np.float32)
    along_y = np.zeros((CHANNELS * 4, 3, window, 1), np.float32)
    for c in range(CHANNELS):
        along_x[3 * c : 3 * c + 3, 0, 0] = one, t, t * t
        along_y[4 * c, 0, :, 0] = one
        along_y[4 * c + 1, 1, :, 0] = one
        along_y[4 * c + 2, 0, :, 0] = t
        along_y[4 * c + 3, 0, :, 0] = t * t
        along_y[4 * c + 3, 2, :, 0] = one
    before, after = padding
    rows = graph.add("Conv", masks, along_x, group=CHANNELS, strides=[1, stride], pads=[0, before, 0, after])
    sums = graph.add("Conv", rows, along_y, group=CHANNELS, strides=[stride, 1], pads=[before, 0, after, 0])
    parts = [graph.channel(sums, index) for index in range(4 * CHANNELS)]
    return [(parts[i], parts[i + 1], parts[i + 2], parts[i + 3]) for i in range(0, len(parts), 4)]


def _blob(graph: Graph, sums: tuple[str, str, str, str]) -> Blob:
    mass, sum_x, sum_y, sum_squares = sums
    divisor = graph.add("Add", mass, 1e-6)
    x, y = graph.add("Div", sum_x, divisor), graph.add("Div", sum_y, divisor)
    squared_center = graph.add("Add", graph.add("Mul", x, x), graph.add("Mul", y, y))
    return Blob(mass, x, y, graph.add("Sub", graph.add("Div", sum_squares, divisor), squared_center))


# ------------------------------------------------------------------------------------------------ the five models


def write_detector(path: Path, half_window: int = 6) -> Path:
    """An SCRFD: score, box and landmarks at strides 8, 16 and 32, two anchors each. Window in strides."""
    graph = Graph()
    masks = _color_masks(graph, "input.1")
    results: dict[str, list[str]] = {"score": [], "bbox": [], "kps": []}
    for stride in (8, 16, 32):
        score, box, landmarks = _detector_level(graph, masks, stride, half_window)
        for kind, tensor, width in (("score", score, 1), ("bbox", box, 4), ("kps", landmarks, 10)):
            last = graph.add("Transpose", tensor, perm=[0, 2, 3, 1])
            # The second anchor repeats the first with a lower score, so that suppression has work to do.
            second = graph.add("Mul", last, 0.9) if kind == "score" else last
            both = graph.add("Concat", last, second, axis=3)
            results[kind].append(graph.reshape(both, [-1, width], output=f"{kind}_{stride}"))
    shapes = {
        name: [f"n{name.split('_')[1]}", width]
        for kind, width in (("score", 1), ("bbox", 4), ("kps", 10))
        for name in results[kind]
    }
    return graph.save(path, ("input.1", [1, 3, "?", "?"]), shapes)


def _detector_level(graph: Graph, masks: str, stride: int, half_window: int) -> tuple[str, str, str]:
    """Score (1, 1, h, w), box (1, 4, h, w) and landmarks (1, 10, h, w) of one stride, in strides."""
    cells = 4  # cells per stride, along each axis
    pooled = graph.add(
        "AveragePool", masks, kernel_shape=[stride // cells] * 2, strides=[stride // cells] * 2
    )
    window = 2 * cells * half_window
    sums = _moments(graph, pooled, window, cells, (window // 2, window // 2 - cells))
    min_area = _PIXEL_AREA / stride**2
    gates, xs, ys = [], [], []
    for channel in range(len(DOT_COLORS)):
        blob = _blob(graph, sums[channel])
        area = graph.add("Mul", blob.mass, 1 / cells**2)
        radius = graph.add("Sqrt", graph.add("Mul", area, 1 / np.pi))
        farthest = graph.add(
            "Add", radius, graph.add("Max", graph.add("Abs", blob.x), graph.add("Abs", blob.y))
        )
        gates.append(graph.greater(area, min_area))
        # The variance of a single disc is about 0.16 times its area; two dots of one colour spread wider.
        gates.append(graph.greater(graph.add("Mul", area, 0.4), blob.variance))
        # A dot cut by the window's edge would have a shifted centre.
        gates.append(graph.greater(half_window - 0.1, farthest))
        xs.append(graph.add("Sub", blob.x, 0.5 / stride))
        ys.append(graph.add("Sub", blob.y, 0.5 / stride))
    # Only the anchor nearest to the nose answers.
    gates += [graph.greater(0.502, graph.add("Abs", offset)) for offset in (xs[NOSE], ys[NOSE])]
    dx, dy = graph.add("Sub", xs[1], xs[0]), graph.add("Sub", ys[1], ys[0])
    eye_distance = graph.add("Sqrt", graph.add("Add", graph.add("Mul", dx, dx), graph.add("Mul", dy, dy)))
    eyes_to_mouth = graph.add("Sub", graph.middle(ys[3], ys[4]), graph.middle(ys[0], ys[1]))
    gates.append(graph.greater(eyes_to_mouth, graph.add("Mul", eye_distance, 0.5)))  # upright
    level = graph.add("Div", sums[LEVEL_CHANNEL][0], graph.add("Add", sums[NOSE][0], 1e-6))
    score = graph.product([*gates, graph.clip01(level)])

    def edge(extreme: str, offsets: Sequence[str], direction: str, margin: float) -> str:
        return graph.add(direction, graph.add(extreme, *offsets), graph.add("Mul", eye_distance, margin))

    left, top = edge("Min", xs, "Sub", 0.75), edge("Min", ys, "Sub", 1.0)
    right, bottom = edge("Max", xs, "Add", 0.75), edge("Max", ys, "Add", 0.7)
    box = graph.add("Concat", graph.add("Neg", left), graph.add("Neg", top), right, bottom, axis=1)
    landmarks = graph.add("Concat", *(value for pair in zip(xs, ys, strict=True) for value in pair), axis=1)
    nan_area = graph.add("Mul", sums[NAN_CHANNEL][0], 1 / cells**2)
    is_sane = graph.add("Sub", 1.0, graph.greater(nan_area, min_area))
    return score, box, graph.add("Div", graph.add("Mul", landmarks, is_sane), is_sane)  # 0 / 0 is NaN


def write_recognizer(path: Path, seed: int = 0, width: int = 512) -> Path:
    """An ArcFace: crops (B, 3, 112, 112) to a fixed random projection of their 7 x 7 averages."""
    graph = Graph()
    hidden = graph.add("InstanceNormalization", "input.1", np.ones(3, np.float32), np.zeros(3, np.float32))
    hidden = graph.add("AveragePool", hidden, kernel_shape=[16, 16], strides=[16, 16])
    projection = np.random.default_rng(seed).standard_normal((3 * 7 * 7, width)).astype(np.float32)
    graph.add("Gemm", graph.add("Flatten", hidden), projection, np.zeros(width, np.float32), output="683")
    return graph.save(path, ("input.1", ["None", 3, 112, 112]), {"683": [1, width]})


def write_sex_and_age(path: Path) -> Path:
    """Scores of female and male, and age / 100, from the mean colour."""
    graph = Graph()
    mean = graph.add("Flatten", graph.add("GlobalAveragePool", "data"))
    weights = np.array([[-1, 1, 0], [0, 0, 0.5], [1, -1, 0]], np.float32)
    graph.add("Gemm", mean, weights, np.array([0, 0, 0.5], np.float32), output="fc1")
    return graph.save(path, ("data", ["None", 3, 96, 96]), {"fc1": [1, 3]})


def write_landmarks(path: Path, count: int, width: int) -> Path:
    """1k3d68 and 2d106det: always the same points (count, width). Our code opens neither; real packages have both."""
    graph = Graph()
    points = np.random.default_rng(count).uniform(-0.5, 0.5, (1, count * width)).astype(np.float32)
    mean = graph.reshape(graph.add("ReduceMean", "data", axes=[1, 2, 3], keepdims=0), [1, 1])
    graph.add("Add", points, graph.add("Mul", mean, 0.0), output="fc1")
    return graph.save(path, ("data", ["None", 3, 192, 192]), {"fc1": [1, count * width]})


def write_package(folder: Path, name: str = "buffalo_l", seed: int = 0) -> Path:
    """Write all five models into `folder`, under the file names of the package `name`. Same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    detector, recognizer = FILES[name]
    write_detector(folder / detector)
    write_recognizer(folder / recognizer, seed)
    write_sex_and_age(folder / "genderage.onnx")
    write_landmarks(folder / "1k3d68.onnx", 1103, 3)
    write_landmarks(folder / "2d106det.onnx", 106, 2)
    return folder


# ------------------------------------------------------------------------------------------------ photos


@dataclass(frozen=True)
class MarkedFace:
    """A face to draw. Position of the nose and distance of the eyes in pixels, angles in degrees."""

    x: float
    y: float
    eye_distance: float
    yaw: float = 0.0
    roll: float = 0.0
    score: float = 1.0
    skin: tuple[int, int, int] = (205, 160, 140)
    identity: int | None = None  # a pattern fixed to the face, by which the recogniser tells people apart
    has_nan: bool = False

    @property
    def landmarks(self) -> np.ndarray:
        """The five dots (5, 2)."""
        distance, height = self.eye_distance, 1.15 * self.eye_distance
        shift = np.deg2rad(self.yaw) * distance
        upright = np.array(
            [
                [-0.5 * distance - shift, -0.5 * height],
                [0.5 * distance - shift, -0.5 * height],
                [0, 0],
                [-0.4 * distance - shift, 0.5 * height],
                [0.4 * distance - shift, 0.5 * height],
            ]
        )
        angle = np.deg2rad(self.roll)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return upright @ rotation.T + [self.x, self.y]


def paint(photo: np.ndarray, landmarks: np.ndarray, score: float = 1.0, has_nan: bool = False) -> np.ndarray:
    """A copy of a photo (H, W, 3), RGB uint8, with the five dots at `landmarks` (5, 2)."""
    import cv2

    photo = photo.copy()
    radius = max(2, round(float(np.linalg.norm(landmarks[1] - landmarks[0])) * 0.11))
    colors = [*DOT_COLORS]
    colors[NOSE] = (0, 0, round(255 * score))
    for (x, y), color in zip(landmarks, colors, strict=True):
        cv2.circle(photo, (round(float(x)), round(float(y))), radius, color, -1)
    if has_nan:
        x, y = landmarks[NOSE]
        cv2.circle(photo, (int(x), int(y + 3.2 * radius)), radius, NAN_COLOR, -1)
    return photo


def synthesize(
    width: int = 640,
    height: int = 640,
    faces: Sequence[MarkedFace] = (),
    background: tuple[int, int, int] = (90, 90, 90),
) -> np.ndarray:
    """A photo (height, width, 3), RGB uint8, with these faces."""
    import cv2

    photo = np.full((height, width, 3), background, np.uint8)
    for face in faces:
        dots = face.landmarks
        center = dots[[0, 1, 3, 4]].mean(axis=0)
        oval = np.zeros((height, width), np.uint8)
        axes = (int(1.1 * face.eye_distance), int(1.5 * face.eye_distance))
        cv2.ellipse(oval, (int(center[0]), int(center[1])), axes, face.roll, 0, 360, 255, -1)
        texture = np.full((112, 112, 3), face.skin, np.float32)
        if face.identity is not None:
            grid = np.random.default_rng(face.identity).uniform(-110, 50, (7, 7)).astype(np.float32)
            texture += cv2.resize(grid, (112, 112), interpolation=cv2.INTER_NEAREST)[..., None]
        # The pattern belongs to the head: a turn moves the dots over it.
        frontal = MarkedFace(face.x, face.y, face.eye_distance, roll=face.roll).landmarks
        skin = cv2.warpAffine(
            texture.clip(0, 255).astype(np.uint8),
            similarity_transform(frontal),
            (width, height),
            flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        photo = np.where(oval[..., None] > 0, skin, photo)
        photo = paint(photo, dots, face.score, face.has_nan)
    return photo
