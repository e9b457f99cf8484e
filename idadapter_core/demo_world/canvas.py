"""A picture that surfaces are painted on, nearest in front."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .arrays import Floats, mix
from .raster import EMPTY, Fragments

# What is in front at a sample; lines of drawn styles run where it changes.
NOTHING, FACE, CLOTHES, EYEBALL, MOUTH, LASH, HAIR, BEARD, GLASSES, HAT, SCARF = range(11)

FAINT = 0.02  # opacity that nobody sees


@dataclass(eq=False)
class Canvas:
    size: int
    light: Floats  # (size * size, 3)
    depth: Floats  # (size * size)
    kind: npt.NDArray[np.uint8]  # (size * size)
    cover: Floats  # (size * size) how much of the background is hidden, 0..1

    @classmethod
    def over(cls, background: Floats) -> Canvas:
        """A canvas on a background (size, size, 3) of light."""
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
        """Fragments (M) in front of what is there, seen `lift` decimetres nearer than they are."""
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
        """Lay colours (M, 3) of light over the canvas where they are in front.

        Args:
            kind: one of the constants, or one per fragment.
            alpha: opacity (M) of 0..1; what is more than half opaque counts as in front.
            hides: opacity above which it hides what is painted later and lies behind.
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
