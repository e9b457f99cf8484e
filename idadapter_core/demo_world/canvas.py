"""A picture with a depth buffer, on which surfaces are painted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .arrays import Floats, mix
from .raster import EMPTY, Fragments

# Kinds of the front surface at a sample. Drawn styles put lines where the kind changes.
NOTHING, FACE, CLOTHES, EYEBALL, MOUTH, LASH, HAIR, BEARD, GLASSES, HAT, SCARF = range(11)

FAINT = 0.02  # opacity too low to be visible


@dataclass(eq=False)
class Canvas:
    """The samples of a square picture in linear light, row by row."""

    size: int
    light: Floats  # (size * size, 3)
    depth: Floats  # (size * size)
    kind: npt.NDArray[np.uint8]  # (size * size)
    cover: Floats  # (size * size) how much of the background is hidden, 0..1

    @classmethod
    def over(cls, background: Floats) -> Canvas:
        """Make a canvas that shows a background (size, size, 3) in linear light."""
        size = len(background)
        light = background.reshape(-1, 3).astype(np.float32).copy()
        return cls(
            size,
            light,
            np.full(size * size, EMPTY, np.float32),
            np.zeros(size * size, np.uint8),
            np.zeros(size * size, np.float32),
        )

    def visible(self, fragments: Fragments, lift: float = 0.0) -> npt.NDArray[np.bool_]:
        """Mask (M,) of the fragments that are in front of the canvas after moving them `lift` decimetres towards the camera."""
        return fragments.depth + np.float32(lift) > self.depth[fragments.pixel]

    def paint(
        self,
        fragments: Fragments,
        color: Floats,
        kind: int | npt.NDArray[np.uint8],
        alpha: Floats | None = None,
        lift: float = 0.0,
        hides: float = 0.5,
    ) -> None:
        """Blend colours (M, 3), in linear light, over the canvas where the fragments are visible.

        Args:
            kind: one of the constants, or one per fragment (M,). Fragments with an opacity above 0.5 set the kind of their sample.
            alpha: opacity (M,), 0..1; None: opaque.
            lift: decimetres by which the fragments are moved towards the camera.
            hides: opacity above which a fragment hides surfaces that are behind it and painted later.
        """
        shown = self.visible(fragments, lift)
        if alpha is None:
            alpha = np.ones(len(fragments), np.float32)
        shown &= alpha > FAINT
        pixel, opacity = fragments.pixel[shown], alpha[shown]
        self.light[pixel] = mix(self.light[pixel], color[shown], opacity[:, None])
        self.cover[pixel] = mix(self.cover[pixel], (1.0,), opacity)
        hiding, front = opacity > hides, opacity > 0.5
        self.depth[pixel[hiding]] = fragments.depth[shown][hiding] + np.float32(lift)
        self.kind[pixel[front]] = kind if isinstance(kind, int) else kind[shown][front]
