"""Identity: everything that is the same in all pictures of a person."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..errors import InputError
from .arrays import Color
from .head import load_head

Sex = Literal["woman", "man"]
SEXES: tuple[Sex, ...] = ("woman", "man")

# The last digit of a seed (seed % 10) decides its group, so groups do not overlap, however many people are drawn.
SPLITS: Mapping[str, tuple[int, ...]] = {
    "training": (0, 1, 2, 3),
    "second_training": (4, 5, 6, 7),  # for the second recogniser, which must not know people of "training"
    "validation": (8,),
    "test": (9,),
}
MAX_SEED = 2**63 - 1
SEED_TAG = 1_206  # separates the random stream of people from others with the same seed

HAIR_STYLES = (
    "bald", "buzz", "short", "quiff", "side_part", "curly", "afro", "bob", "fringe", "long", "wavy", "bun",
)  # fmt: skip
LONG_STYLES = ("bob", "fringe", "long", "wavy")
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
EYE_COLORS: Mapping[str, Color] = {
    "brown": (0.30, 0.17, 0.09),
    "dark": (0.17, 0.10, 0.07),
    "hazel": (0.46, 0.34, 0.16),
    "green": (0.34, 0.50, 0.30),
    "blue": (0.32, 0.52, 0.74),
    "gray": (0.50, 0.58, 0.63),
}
HAIR_COLORS: Mapping[str, Color] = {
    "black": (0.075, 0.065, 0.065),
    "dark brown": (0.17, 0.11, 0.08),
    "brown": (0.30, 0.185, 0.11),
    "chestnut": (0.42, 0.23, 0.12),
    "blond": (0.76, 0.58, 0.34),
    "platinum": (0.88, 0.80, 0.64),
    "red": (0.60, 0.25, 0.10),
    "gray": (0.56, 0.56, 0.57),
    "white": (0.86, 0.86, 0.87),
}

# Half the width of the range of shapes, by part of the face; 1 is the full sculpted shape. A uniform distribution separates people
# as well as a normal one of the same deviation, and has no tails that look odd.
SPREADS: Mapping[str, float] = {
    "cheek": 0.90, "chin": 0.60, "ears": 0.55, "eyebrows": 0.65, "eyes": 0.75, "forehead": 0.35, "head": 0.36,
    "mouth": 0.62, "neck": 0.25, "nose": 0.80, "outline": 0.72,
}  # fmt: skip
SPREAD_OF: Mapping[str, float] = {
    # Faces are not shifted to one side.
    "head-trans-out": 0, "nose-trans-out": 0, "mouth-trans-out": 0, "neck-trans-out": 0,
    # At full strength these look like a caricature, or fold the skin.
    "nose-scale-depth-incr": 0.40, "nose-scale-vert-incr": 0.42, "nose-trans-forward": 0.25, "nose-nostrils-angle-up": 0.3,
    "nose-hump-incr": 0.45, "nose-compression-uncompress": 0.3, "nose-curve-convex": 0.45,
    "chin-jaw-drop-incr": 0.30, "chin-height-incr": 0.35, "chin-prognathism-incr": 0.22, "chin-prominent-incr": 0.4,
    "head-age-incr": 0.15, "head-fat-incr": 0.35, "head-angle-out": 0.15, "head-trans-forward": 0.15, "head-trans-up": 0.1,
    "neck-double-incr": 0.1, "mouth-trans-forward": 0.35, "mouth-scale-depth-incr": 0.35, "mouth-laugh-lines-out": 0.3, "mouth-scale-vert-incr": 0.3, "mouth-scale-horiz-incr": 0.4,
    "mouth-lowerlip-volume-incr": 0.4, "mouth-upperlip-volume-incr": 0.45, "mouth-upperlip-height-incr": 0.35, "mouth-lowerlip-height-incr": 0.35,
    "eye-bag-incr": 0.2, "eye-bag-out": 0.2, "eye-bag-height-incr": 0.2, "eye-push1-out": 0.3, "eye-push2-out": 0.3,
    "eye-trans-up": 0.35, "eye-trans-out": 0.5, "eye-height1-incr": 0.35, "eye-height3-incr": 0.35, "mouth-angles-up": 0.35,
}  # fmt: skip
# Centers of the ranges. All eyes are larger than the sculpted ones, because an eye is only ten pixels wide in a picture of 128 pixels,
# and people look at eyes.
CENTERS: Mapping[Sex, Mapping[str, float]] = {
    "woman": {
        "eye-scale-incr": 0.62, "eye-height2-incr": 0.35, "eyebrows-trans-up": 0.30, "eye-corner2-up": 0.2,
        "chin-jaw-drop-incr": -0.22, "chin-width-incr": -0.40, "chin-height-incr": -0.15, "chin-bones-incr": -0.25,
        "nose-scale-horiz-incr": -0.25, "nose-scale-vert-incr": -0.15, "nose-hump-incr": -0.30, "nose-volume-incr": -0.25,
        "nose-point-up": 0.25, "nose-scale-depth-incr": -0.15, "nose-width2-incr": -0.2, "mouth-angles-up": 0.18,
        "mouth-upperlip-volume-incr": 0.25, "mouth-lowerlip-volume-incr": 0.2, "mouth-upperlip-height-incr": 0.2,
        "mouth-cupidsbow-incr": 0.2, "cheek-bones-incr": 0.25, "cheek-volume-incr": 0.15, "head-fat-incr": -0.1,
        "neck-scale-horiz-incr": -0.45, "measure-neck-circ-incr": -0.4, "head-age-incr": -0.15, "eye-bag-incr": -0.2,
    },
    "man": {
        "eye-scale-incr": 0.45, "eye-height2-incr": 0.25, "eyebrows-trans-up": 0.18, "mouth-angles-up": 0.12,
        "mouth-scale-horiz-incr": 0.25, "mouth-lowerlip-volume-incr": -0.25, "mouth-upperlip-volume-incr": -0.15,
        "chin-jaw-drop-incr": -0.12, "nose-scale-vert-incr": -0.12, "nose-volume-incr": -0.1, "nose-scale-depth-incr": -0.1,
        "head-age-incr": -0.1,
    },
}  # fmt: skip
ASYMMETRY = 0.04  # standard deviation of each shape between the two sides


@dataclass(frozen=True)
class Hair:
    """The hair of the head."""

    style: str
    color_name: str  # before it turned gray
    color: Color
    length: float  # 0..1, within the range of the style
    part: int  # -1 or 1: side of the parting
    recession: float  # 0..1

    def __post_init__(self) -> None:
        require_one_of("hair style", self.style, HAIR_STYLES)


@dataclass(frozen=True)
class Brows:
    """Lengths in decimetres of the template."""

    thickness: float
    arch: float
    tilt: float
    density: float  # 0..1
    height: float
    gap: float  # from the middle to the inner end
    reach: float  # from the middle to the outer end


@dataclass(frozen=True)
class Look:
    """Appearance apart from the shape: skin, hair, brows, eyes, beard and make-up."""

    tone: float  # 0 light .. 6 dark
    undertone: tuple[float, float, float]  # deviation in red, green, blue, in standard deviations
    hair: Hair
    brows: Brows
    eyes: str
    beard: str
    lips: tuple[float, float, float]  # 0..1: darkness, and two values for the colour of the lipstick
    lipstick: float  # 0..1, strength
    freckles: float  # 0..1
    moles: int
    texture_seed: int

    def __post_init__(self) -> None:
        require_one_of("colour of eyes", self.eyes, tuple(EYE_COLORS))
        require_one_of("beard", self.beard, BEARDS)


@dataclass(frozen=True)
class Person:
    """A person who does not exist. Equal persons look equal, and a seed gives the same person on every run."""

    seed: int
    sex: Sex
    age: float  # years
    ancestry: tuple[float, float, float]  # African, Asian, European; they sum to 1
    weight: float  # 0 thin .. 1 heavy
    shape: tuple[float, ...]  # one per name of `trait_names()`, about -1..1
    asymmetry: tuple[float, ...]  # one per shape of the head
    look: Look

    def __post_init__(self) -> None:
        require_one_of("sex", self.sex, SEXES)
        for name, count in (("shape", len(trait_names())), ("asymmetry", len(load_head().shape_names))):
            if len(getattr(self, name)) != count:
                raise InputError(
                    f"the {name} of a person has {count} values, got {len(getattr(self, name))}; "
                    "start from Person.sample and replace single values."
                )

    @classmethod
    def sample(cls, seed: int) -> Person:
        """Return the person of a seed, 0..2**63-1.

        Raises:
            InputError: the seed is not a whole number in that range.
        """
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= MAX_SEED:
            raise InputError(
                f"the seed of a person must be a whole number in 0..2**63-1, got {seed!r}; choose another one."
            )
        return _sample(int(seed))

    def with_look_of(self, other: Person) -> Person:
        """Return this person with the skin, hair, brows, eyes and beard of another one, so that the two differ in shape alone.

        Raises:
            InputError: the two differ in sex, so the look would not fit.
        """
        if self.sex != other.sex:
            raise InputError(
                f"a {self.sex} cannot take the look of a {other.sex}; choose two people of the same sex."
            )
        return replace(self, look=other.look)


def require_one_of(what: str, value: str, names: Sequence[str]) -> None:
    """Raise InputError if `value` is not in `names`. `what` describes the value in the message."""
    if value not in names:
        raise InputError(f"there is no {what} {value!r}; choose one of: {', '.join(names)}.")


def seed_of(split: str, index: int) -> int:
    """Return the seed of person `index` (0, 1, 2, ...) in a group of `SPLITS`.

    Raises:
        InputError: the group is unknown, or the index is negative.
    """
    require_one_of("group of people", split, tuple(SPLITS))
    if index < 0:
        raise InputError(f"people of a group are counted from 0, got {index}; choose another index.")
    digits = SPLITS[split]
    return index // len(digits) * 10 + digits[index % len(digits)]


def split_of(seed: int) -> str:
    """Return the group of a seed."""
    return next(name for name, digits in SPLITS.items() if seed % 10 in digits)


def base_name(shape: str) -> str:
    """Return a shape's name without its side. Both sides vary together."""
    return shape[2:] if shape.startswith(("l-", "r-")) else shape


@functools.cache
def trait_names() -> tuple[str, ...]:
    """Names of the values in `Person.shape`: local shapes, with both sides as one, then outlines."""
    head = load_head()
    return (*dict.fromkeys(base_name(name) for name in head.shape_names), *head.outlines.names)


@functools.cache
def _ranges(sex: Sex) -> tuple[tuple[float, float], ...]:
    """Center and half width of the range of each value of `Person.shape`."""
    head = load_head()
    regions = {
        base_name(name): region for name, region in zip(head.shape_names, head.shape_regions, strict=True)
    }
    return tuple(
        (CENTERS[sex].get(name, 0.0), SPREAD_OF.get(name, SPREADS[regions.get(name, "outline")]))
        for name in trait_names()
    )


def choose(rng: np.random.Generator, chances: Mapping[str, float]) -> str:
    """Draw one of the names with probabilities proportional to `chances`."""
    names = list(chances)
    total, at = sum(chances.values()), float(rng.random())
    for name in names:
        at -= chances[name] / total
        if at < 0:
            return name
    return names[-1]


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw uniformly from `low`..`high`."""
    return low + (high - low) * float(rng.random())


def _sample(seed: int) -> Person:
    rng = np.random.default_rng([SEED_TAG, seed])
    sex = SEXES[int(rng.random() < 0.5)]
    age = 19 + 50 * float(rng.random()) ** 2
    shares = rng.random(3) ** 2.5 + 1e-3  # mostly one ancestry, often two
    african, asian, european = (float(share) for share in shares / shares.sum())
    shape = tuple(center + between(rng, -spread, spread) for center, spread in _ranges(sex))
    asymmetry = tuple(float(x) for x in ASYMMETRY * rng.standard_normal(len(load_head().shape_names)))
    return Person(
        seed=seed,
        sex=sex,
        age=age,
        ancestry=(african, asian, european),
        weight=between(rng, 0.2, 0.75),
        shape=shape,
        asymmetry=asymmetry,
        look=_look(rng, sex, age, african, european),
    )


def _look(rng: np.random.Generator, sex: Sex, age: float, african: float, european: float) -> Look:
    # Skin tone follows ancestry loosely, so that faces of each ancestry occur in most tones.
    tone = (
        4.3 * african + 1.9 * (1 - african - european) + 0.9 * european + 0.95 * float(rng.standard_normal())
    )
    tone = min(max(tone, 0.0), 6.0)
    fair = european * min(max(1.4 - tone / 3.2, 0.15), 1)
    hair = _hair(rng, sex, age, african, fair)
    eyes = choose(
        rng,
        {
            "brown": 0.45 - 0.22 * fair, "dark": 0.35 * (1 - fair), "hazel": 0.12 + 0.06 * fair, "green": 0.02 + 0.16 * fair,
            "blue": 0.01 + 0.25 * fair, "gray": 0.02 + 0.12 * fair,
        },
    )  # fmt: skip
    man = sex == "man"
    brows = Brows(
        thickness=between(rng, 0.028, 0.05) if man else between(rng, 0.016, 0.032),
        arch=between(rng, -0.025, 0.015) if man else between(rng, -0.015, 0.03),
        tilt=between(rng, -0.06, 0.0),
        density=between(rng, 0.55, 1) if man else between(rng, 0.4, 0.9),
        height=between(rng, -0.02, 0.02),
        gap=between(rng, 0.10, 0.16),
        reach=between(rng, 0.5, 0.58),
    )
    beards = {"none": 0.42, "stubble": 0.22, "moustache": 0.08, "goatee": 0.11, "full": 0.17}
    return Look(
        tone=tone,
        undertone=(float(rng.standard_normal()), float(rng.standard_normal()), float(rng.standard_normal())),
        hair=hair,
        brows=brows,
        eyes=eyes,
        beard=choose(rng, beards) if man else "none",
        lips=(float(rng.random()), float(rng.random()), float(rng.random())),
        lipstick=0.0 if man or rng.random() < 0.45 else between(rng, 0.35, 0.8),
        freckles=between(rng, 0.4, 1) if rng.random() < 0.35 * fair else 0.0,
        moles=int(choose(rng, {"0": 0.45, "1": 0.3, "2": 0.15, "3": 0.1})),
        texture_seed=int(rng.integers(1 << 31)),
    )


def _hair(rng: np.random.Generator, sex: Sex, age: float, african: float, fair: float) -> Hair:
    name = choose(
        rng,
        {
            "black": 0.55 * (1 - fair) + 0.05, "dark brown": 0.32, "brown": 0.12 + 0.14 * fair, "chestnut": 0.03 + 0.15 * fair,
            "blond": 0.26 * fair, "platinum": 0.06 * fair, "red": 0.14 * fair,
        },
    )  # fmt: skip
    brightness = between(rng, 0.88, 1.12)
    red, green, blue = HAIR_COLORS[name]
    color: Color = (red * brightness, green * brightness, blue * brightness)
    turns_gray, white, share = rng.random() < 0.5, rng.random() < 0.4, between(rng, 0.3, 1)
    if turns_gray and age > 46:
        amount = min((age - 46) / 14, 1) * share
        target = HAIR_COLORS["white" if white else "gray"]
        red, green, blue = (a + (b - a) * amount for a, b in zip(color, target, strict=True))
        color = (red, green, blue)
    if sex == "man":
        chances = {
            "bald": 0.09,
            "buzz": 0.14,
            "short": 0.24,
            "quiff": 0.16,
            "side_part": 0.17,
            "curly": 0.1,
            "long": 0.03,
        }
    else:
        chances = {
            "long": 0.23,
            "wavy": 0.2,
            "bob": 0.17,
            "fringe": 0.12,
            "bun": 0.12,
            "curly": 0.08,
            "short": 0.02,
        }
    chances["afro"] = 0.25 * max(african - 0.25, 0)
    recession = between(rng, 0, 1.2) * min(max((age - 25) / 40, 0), 1) if sex == "man" else 0.0
    return Hair(
        style=choose(rng, chances),
        color_name=name,
        color=color,
        length=float(rng.random()),
        part=1 if rng.random() < 0.5 else -1,
        recession=min(recession, 1.0),
    )
