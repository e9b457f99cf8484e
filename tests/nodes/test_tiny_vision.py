"""The tiny CLIP vision models in ComfyUI's own loader, which goes on knowing the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.golden import recipe
from tests.tiny.vision import (
    NARROW_WIDTH,
    PATCHES,
    TINY_VISION,
    WIDTH,
    config_file,
    tiny_clip_vision,
    vision_state,
    write_tiny_clip_vision,
)

WIDTHS = (WIDTH, NARROW_WIDTH)


def photos() -> torch.Tensor:
    """Two pictures (2, 300, 240, 3) in 0..1: neither square nor of CLIP's size."""
    return recipe.value(0, "photos", (2, 300, 240, 3)).sigmoid()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_file_holds_the_model_made_in_this_process(tmp_path: Path, width: int) -> None:
    import comfy.clip_vision

    loaded = comfy.clip_vision.load(str(write_tiny_clip_vision(tmp_path)[width]))
    made = tiny_clip_vision(width)
    assert type(loaded) is comfy.clip_vision.ClipVisionModel
    assert loaded.config == json.loads(config_file(width).read_text(encoding="utf-8"))
    weights, expected = loaded.get_sd(), made.get_sd()
    assert weights.keys() == expected.keys() == vision_state(width).keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with torch.inference_mode():
        one, other = loaded.encode_image(photos()), made.encode_image(photos())
    for output in ("last_hidden_state", "penultimate_hidden_states", "image_embeds"):
        assert torch.equal(one[output], other[output])


@pytest.mark.parametrize("width", WIDTHS)
def test_every_hidden_state_tells_pictures_apart(width: int) -> None:
    with torch.inference_mode():
        encoded = tiny_clip_vision(width).encode_image(photos())
    for output in ("last_hidden_state", "penultimate_hidden_states"):
        states = encoded[output]
        assert states.shape == (2, 1 + PATCHES, width)
        assert torch.isfinite(states).all()
        assert (states[0] - states[1]).abs().amax(dim=-1).min() > 0.01
    assert encoded["image_embeds"].shape == (2, TINY_VISION["projection_dim"])


def test_a_real_model_is_still_recognised_by_comfyui() -> None:
    import comfy.clip_vision

    # What ComfyUI tells ViT-L/14 from; it warns of the weights that are not there and leaves them as they are.
    layers = "vision_model.encoder.layers"
    loaded = comfy.clip_vision.load_clipvision_from_sd(
        {
            "vision_model.embeddings.class_embedding": torch.ones(1024),
            "vision_model.embeddings.position_embedding.weight": torch.ones(257, 1024),
            **{f"{layers}.{number}.layer_norm1.weight": torch.ones(1024) for number in range(24)},
        }
    )
    assert (loaded.config["hidden_size"], loaded.config["num_hidden_layers"]) == (1024, 24)
    assert loaded.get_sd()["vision_model.embeddings.class_embedding"].eq(1).all()


def test_an_unknown_file_is_still_none() -> None:
    import comfy.clip_vision

    width = WIDTH + 1
    assert comfy.clip_vision.load_clipvision_from_sd({"weight": torch.ones(WIDTH)}) is None
    unknown = {"vision_model.embeddings.class_embedding": torch.ones(width)}
    assert comfy.clip_vision.load_clipvision_from_sd(unknown) is None


def test_a_tiny_file_that_lacks_a_weight_is_refused() -> None:
    import comfy.clip_vision

    state = vision_state()
    del state["vision_model.post_layernorm.bias"]
    with pytest.raises(ValueError, match=r"missing=\['vision_model\.post_layernorm\.bias'\]"):
        comfy.clip_vision.load_clipvision_from_sd(state)


def test_registering_twice_changes_nothing() -> None:
    import comfy.clip_vision
    import comfy.supported_models

    from tests.tiny.tiny_pack import register

    loader, models = comfy.clip_vision.load_clipvision_from_sd, list(comfy.supported_models.models)
    register()
    assert comfy.clip_vision.load_clipvision_from_sd is loader
    assert comfy.supported_models.models == models
