"""IDAdapter's configurations: the paper's sizes, presets, and configurations that cannot be."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from idadapter_core.errors import InputError
from idadapter_core.mechanisms.text import identity_clause, with_identity_clause
from idadapter_core.methods.idadapter import PRESETS, IDAdapterConfig, parameter_counts
from idadapter_core.methods.idadapter.config import describe
from idadapter_core.methods.uniid import UniIDConfig
from tests.core.idadapter.small import RESAMPLED, SMALL
from tests.tiny.idadapter import tiny_idadapter, vision_features

# --- sizes -----------------------------------------------------------------------------------------------------------


def test_the_sd21_preset_has_the_papers_size() -> None:
    counts = parameter_counts(PRESETS["sd21"])
    parts = {name: round(counts[name] / 1e6, 2) for name in ("deltas", "gates", "mixer")}
    assert parts == {"deltas": 25.56, "gates": 211.21, "mixer": 25.19}
    assert round(sum(counts[name] for name in parts) / 1e6, 2) == 261.96
    assert counts["resampler"] == 0


def test_every_preset_counts_as_its_shapes_say() -> None:
    for config in PRESETS.values():
        d, counts = config.vision_width, parameter_counts(config)
        gate = sum(d * w + w + 16 * w * w + 2 * 2 * w + w + 8 * w + w + 2 for w in config.site_widths)
        word = sum(2 * d + d * 1024 + 1024 + 1024 * w + w for w in config.text_widths)
        assert counts["gates"] == gate
        assert counts["deltas"] == 2 * config.context_width * sum(config.site_widths)
        assert counts["mixer"] == 2 * (12 * d * d + 13 * d)
        assert counts["face"] == 512 * d + d
        assert counts["word"] == word


def test_presets_are_of_their_families() -> None:
    sizes = {name: (len(c.site_widths), c.context_width, c.text_widths) for name, c in PRESETS.items()}
    assert sizes == {
        "sd15": (16, 768, (768,)),
        "sd21": (16, 1024, (1024,)),
        "sdxl": (70, 2048, (768, 1280)),
    }
    assert set(PRESETS["sd15"].site_heads) == {8}
    for name in ("sd21", "sdxl"):
        heads = zip(PRESETS[name].site_widths, PRESETS[name].site_heads, strict=True)
        assert {width / count for width, count in heads} == {64}
    assert PRESETS["sdxl"].site_widths == UniIDConfig().site_widths
    assert PRESETS["sd21"] == IDAdapterConfig()
    assert {(c.references, c.vision_width) for c in PRESETS.values()} == {(4, 1024)}


def test_a_resampling_has_a_size_of_its_own() -> None:
    kept, resampled = parameter_counts(SMALL), parameter_counts(RESAMPLED)
    assert resampled.pop("resampler") > kept.pop("resampler") == 0
    assert resampled == kept


# --- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"references": 0}, "references must be at least 1, got 0"),
        ({"vision_width": 0}, "vision_width must be at least 1, got 0"),
        ({"vision_patches": 0}, "vision_patches must be at least 1, got 0"),
        ({"embedding_width": -1}, "embedding_width must be at least 1, got -1"),
        ({"mixer_heads": 0}, "mixer_heads must be at least 1, got 0"),
        ({"context_width": 0}, "context_width must be at least 1, got 0"),
        ({"mixer_depth": -1}, "mixer_depth must be at least 0, got -1"),
        ({"tokens": -1}, "tokens must be at least 0, got -1"),
        ({"resampler_depth": -2}, "resampler_depth must be at least 0, got -2"),
        (
            {"tokens": 16, "resampler_depth": 0},
            "resampler_depth must be at least 1 where E_r is resampled (to 16",
        ),
        (
            {"text_encoders": ("l", "g")},
            "text_encoders ('l', 'g') and text_widths (1024,) must be as many",
        ),
        ({"text_encoders": ("t5",)}, "text_encoders must be different ones of l, g, h, got ('t5',)"),
        (
            {"text_encoders": ("l", "l"), "text_widths": (768, 768)},
            "must be different ones of l, g, h, got ('l', 'l')",
        ),
        ({"text_tokens": 0}, "text_tokens must be at least 1, got 0"),
        ({"text_hidden": 0}, "text_hidden must be at least 1, got 0"),
        ({"text_widths": (0,)}, "text_widths must be at least 1 each, got (0,)"),
        ({"site_widths": (0,), "site_heads": (1,)}, "site_widths must be at least 1 each, got (0,)"),
        ({"site_widths": (), "site_heads": ()}, "site_widths (0) and site_heads (0) must be as many"),
        ({"site_heads": (8,)}, "site_widths (16) and site_heads (1) must be as many, at least one"),
        ({"mixer_heads": 10}, "width 1024 must be divisible by its number of heads, got 10"),
        (
            {"site_widths": (320, 640), "site_heads": (5, 7)},
            "width 640 must be divisible by its number of heads, got 7",
        ),
        (
            {"site_widths": (320,), "site_heads": (0,)},
            "width 320 must be divisible by its number of heads, got 0",
        ),
        ({"unconditional": "none"}, "unconditional must be one of skip, zeros, got 'none'"),
    ],
)
def test_impossible_configs(changes: dict[str, int], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        replace(IDAdapterConfig(), **changes)


def test_an_absent_identity_word_has_no_sizes_to_check() -> None:
    config = replace(SMALL, text_encoders=(), text_widths=(), text_tokens=0, text_hidden=0)
    assert not config.has_text_branch
    assert tiny_idadapter(config).encode(vision_features(1)).text_tokens == {}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "identity tokens: up to 65, all kept"),
        ({"tokens": 6}, "identity tokens: resampled to 6"),
        ({}, "CLIP vision of width 64 with 16 patches"),
        ({}, "identity word (1 embedding) for the text encoders l 64"),
        ({"text_tokens": 2}, "identity word (2 embeddings) for the text encoders l 64"),
        ({"text_encoders": (), "text_widths": ()}, "no identity word"),
        ({}, "negative prompts: without the adapters"),
        ({"unconditional": "zeros"}, "negative prompts: with the tokens of zeroed features"),
        ({}, "face recogniser: not recorded in the file"),
        ({"recognizer": "feed"}, "face recogniser: feed"),
    ],
)
def test_the_description_tells_the_settings(changes: dict[str, int], line: str) -> None:
    assert line in "\n".join(describe(replace(SMALL, **changes)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo of a person in Paris", "a photo of a person in Paris, woman is sks"),
        ("a photo, ", "a photo, woman is sks"),
        ("a photo ,", "a photo, woman is sks"),
        ("A photo.", "A photo, woman is sks"),
        ("", "woman is sks"),
        (" ,", "woman is sks"),
    ],
)
def test_the_clause_stands_at_the_end_of_the_prompt(text: str, expected: str) -> None:
    assert identity_clause("woman") == "woman is sks"
    assert with_identity_clause(text, "woman") == expected
