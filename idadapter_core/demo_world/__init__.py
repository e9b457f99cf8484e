"""Synthetic portraits of people who don't exist, rendered with numpy alone. Every property of a picture is known.

    pictures = render([Person.sample(seed)], [Factors.sample(numpy.random.default_rng(0))])

See docs/demo_world.md.
"""

from .captions import FACTORS, caption
from .factors import ACCESSORIES, BACKGROUNDS, CLOTHES, DIRECTIONS, EXPRESSIONS, STYLES, Factors, Light
from .identity import SEXES, SPLITS, Person, seed_of, split_of
from .render import Pictures, render

__all__ = [
    "ACCESSORIES",
    "BACKGROUNDS",
    "CLOTHES",
    "DIRECTIONS",
    "EXPRESSIONS",
    "FACTORS",
    "SEXES",
    "SPLITS",
    "STYLES",
    "Factors",
    "Light",
    "Person",
    "Pictures",
    "caption",
    "render",
    "seed_of",
    "split_of",
]
