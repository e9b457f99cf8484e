"""Factors: the properties that may differ between pictures of the same person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .arrays import Color
from .identity import between, require_one_of

STYLES = ("photo", "sketch", "oil", "comic", "night")
BACKGROUNDS = ("studio", "snow", "beach", "forest", "city_night", "brick", "bookshelf", "sunset")
ACCESSORIES = ("none", "glasses", "sunglasses", "beanie", "cap", "scarf")
DIRECTIONS = ("left", "ahead", "right")  # as seen in the picture
COLLARS = ("round", "wide", "v", "high")
CLOTHES: Mapping[str, Color] = {
    "red": (0.74, 0.13, 0.13),
    "orange": (0.88, 0.45, 0.12),
    "yellow": (0.90, 0.76, 0.22),
    "green": (0.14, 0.46, 0.24),
    "blue": (0.13, 0.29, 0.66),
    "purple": (0.42, 0.19, 0.55),
    "white": (0.90, 0.89, 0.87),
    "black": (0.11, 0.11, 0.12),
}

# Facial actions of each expression, by ARKit's names without their side. Each expression changes the mouth and also brows or
# eyes, so that it is recognisable at 128 pixels and behind sunglasses.
EXPRESSIONS: Mapping[str, Mapping[str, float]] = {
    "neutral": {"mouthSmile": 0.08},
    "smiling": {
        "mouthSmile": 1.1, "cheekSquint": 0.55, "eyeSquint": 0.15, "mouthUpperUp": 0.8, "mouthLowerDown": 0.35, "mouthDimple": 0.3, "jawOpen": 0.16,
        "mouthStretch": 0.2, "browOuterUp": 0.15,
    },
    "laughing": {
        "mouthSmile": 1.05, "cheekSquint": 0.9, "eyeSquint": 0.55, "jawOpen": 0.72, "mouthUpperUp": 0.55, "mouthLowerDown": 0.25,
        "mouthStretch": 0.25, "browOuterUp": 0.3, "browInnerUp": 0.2,
    },
    "sad": {
        "browInnerUp": 1.3, "mouthFrown": 1.25, "mouthShrugLower": 0.6, "eyeLookDown": 0.25, "mouthPress": 0.2, "eyeSquint": 0.15,
        "mouthRollLower": 0.2,
    },
    "angry": {
        "browDown": 1.5, "noseSneer": 0.9, "eyeSquint": 0.3, "eyeWide": 0.3, "mouthFrown": 0.9, "mouthPress": 0.6, "mouthRollLower": 0.3,
        "mouthRollUpper": 0.3, "jawForward": 0.3, "cheekSquint": 0.3,
    },
    "surprised": {"browInnerUp": 1.1, "browOuterUp": 1.1, "eyeWide": 1.1, "jawOpen": 0.75, "mouthFunnel": 0.25},
    "eyes_closed": {"eyeBlink": 1.0, "mouthSmile": 0.12, "browInnerUp": 0.15},
}  # fmt: skip

YAW_OF: Mapping[str, float] = {"left": -26, "ahead": 0, "right": 26}  # degrees, the middle of each class
YAW_SPREAD = 8.0
YAW_BORDER = 13.0  # halfway between the classes
LIMITS: Mapping[str, float] = {"yaw": 45, "pitch": 25, "roll": 25}

# Ambient light by background. `Factors.sample` uses these values, but the light is a factor of its own.
AMBIENT: Mapping[str, Color] = {
    "studio": (0.64, 0.64, 0.67), "snow": (0.78, 0.83, 0.92), "beach": (0.76, 0.79, 0.82), "forest": (0.54, 0.62, 0.50),
    "city_night": (0.44, 0.42, 0.56), "brick": (0.62, 0.56, 0.52), "bookshelf": (0.62, 0.54, 0.46), "sunset": (0.66, 0.52, 0.50),
}  # fmt: skip
KEY_COLORS: Mapping[str, Color] = {
    "sunset": (1.22, 0.84, 0.58), "city_night": (1.0, 0.88, 1.04), "bookshelf": (1.12, 0.97, 0.80),
}  # fmt: skip
WHITE_LIGHTS: tuple[Color, ...] = ((1, 1, 1), (1.08, 0.99, 0.88), (0.92, 0.98, 1.08))
ACCESSORY_COLORS: tuple[Color, ...] = (
    (0.62, 0.12, 0.14), (0.14, 0.28, 0.52), (0.16, 0.38, 0.24), (0.74, 0.55, 0.16), (0.32, 0.32, 0.36), (0.46, 0.24, 0.44),
    (0.80, 0.74, 0.64), (0.12, 0.12, 0.14),
)  # fmt: skip


@dataclass(frozen=True)
class Light:
    """A lamp and ambient light. The values of their colours may exceed 1."""

    azimuth: float  # degrees, positive from the right of the picture
    elevation: float  # degrees above the horizon
    key: Color  # brightness and colour of the lamp
    ambient: Color


@dataclass(frozen=True)
class Factors:
    """The factors of one picture. They are independent: changing one does not change what the others draw."""

    style: str
    background: str
    background_seed: int
    accessory: str
    accessory_color: Color
    clothes: str  # name of a colour
    collar: str
    expression: str
    strength: float  # of the expression; 1: as in `EXPRESSIONS`
    yaw: float  # degrees; positive looks to the right of the picture
    pitch: float  # degrees; positive looks down
    roll: float  # degrees; positive tilts the head to the left of the picture
    gaze: tuple[float, float]  # of the eyes: to the right and up, about -0.5..0.5
    light: Light
    zoom: float  # about 1
    shift: tuple[float, float]  # of the camera, decimetres to the right and up
    seed: int  # of brush strokes and of the wording of the caption

    def __post_init__(self) -> None:
        require_one_of("style", self.style, STYLES)
        require_one_of("background", self.background, BACKGROUNDS)
        require_one_of("accessory", self.accessory, ACCESSORIES)
        require_one_of("colour of clothes", self.clothes, tuple(CLOTHES))
        require_one_of("collar", self.collar, COLLARS)
        require_one_of("expression", self.expression, tuple(EXPRESSIONS))
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if not -limit <= value <= limit:
                raise InputError(
                    f"{name} must lie within ±{limit:g} degrees, got {value:g}; choose a smaller angle."
                )
        if not 0.5 <= self.zoom <= 1.5:
            raise InputError(f"zoom must lie within 0.5..1.5, got {self.zoom:g}; choose a value near 1.")

    @property
    def direction(self) -> str:
        """Class of the yaw, one of `DIRECTIONS`."""
        return "left" if self.yaw < -YAW_BORDER else "right" if self.yaw > YAW_BORDER else "ahead"

    @classmethod
    def sample(
        cls,
        rng: np.random.Generator,
        *,
        style: str | None = None,
        background: str | None = None,
        accessory: str | None = None,
        clothes: str | None = None,
        expression: str | None = None,
        direction: str | None = None,
    ) -> Factors:
        """Draw random factors, except the given ones. Use `dataclasses.replace` to set the other fields.

        A given class does not change the draws of the rest: the generator advances by the same steps. The light matches the background.
        Closed eyes and sunglasses occur together only if one of them is given.

        Raises:
            InputError: a given class does not exist.
        """
        drawn = {
            "background": _one_of(rng, BACKGROUNDS),
            "expression": _one_of(rng, tuple(EXPRESSIONS)),
            "direction": _one_of(rng, DIRECTIONS),
            "clothes": _one_of(rng, tuple(CLOTHES)),
            "accessory": _one_of(rng, ACCESSORIES) if rng.random() < 0.6 else "none",
            "style": _one_of(rng, STYLES) if rng.random() < 0.5 else "photo",
        }
        given = {
            "background": background, "expression": expression, "direction": direction, "clothes": clothes,
            "accessory": accessory, "style": style,
        }  # fmt: skip
        drawn |= {name: value for name, value in given.items() if value is not None}
        if (
            expression is None
            and accessory is None
            and drawn["expression"] == "eyes_closed"
            and drawn["accessory"] == "sunglasses"
        ):
            drawn["accessory"] = "glasses"  # closed eyes are invisible behind sunglasses
        require_one_of("direction", drawn["direction"], DIRECTIONS)
        require_one_of("background", drawn["background"], BACKGROUNDS)
        return cls(
            style=drawn["style"],
            background=drawn["background"],
            background_seed=int(rng.integers(1 << 31)),
            accessory=drawn["accessory"],
            accessory_color=ACCESSORY_COLORS[int(rng.random() * len(ACCESSORY_COLORS))],
            clothes=drawn["clothes"],
            collar=_one_of(rng, COLLARS),
            expression=drawn["expression"],
            strength=between(rng, 0.85, 1.05),
            yaw=YAW_OF[drawn["direction"]] + between(rng, -YAW_SPREAD, YAW_SPREAD),
            pitch=_normal(rng, 4.5, 12),
            roll=_normal(rng, 3.5, 10),
            gaze=(_normal(rng, 0.15, 0.4), _normal(rng, 0.12, 0.3)),
            light=_light(rng, drawn["background"]),
            zoom=between(rng, 0.97, 1.1),
            shift=(_normal(rng, 0.05, 0.12), _normal(rng, 0.05, 0.12)),
            seed=int(rng.integers(1 << 31)),
        )


def _light(rng: np.random.Generator, background: str) -> Light:
    red, green, blue = KEY_COLORS.get(background, WHITE_LIGHTS[int(rng.random() * len(WHITE_LIGHTS))])
    brightness = between(rng, 0.9, 1.12)
    return Light(
        azimuth=between(rng, -55, 55),
        elevation=between(rng, 15, 48),
        key=(red * brightness, green * brightness, blue * brightness),
        ambient=AMBIENT[background],
    )


def _one_of(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.random() * len(names))]


def _normal(rng: np.random.Generator, deviation: float, limit: float) -> float:
    return min(max(deviation * float(rng.standard_normal()), -limit), limit)
