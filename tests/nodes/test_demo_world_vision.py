"""The demo world's CLIP vision model sees the same in ComfyUI and in the trainer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from idadapter_core.demo_world.build.train_vision import CONFIG, CONFIG_FILE, WEIGHTS, save_vision
from idadapter_core.stable_diffusion.vision import load_vision, preprocess
from tests.golden import recipe


def test_both_read_one_folder(tmp_path: Path) -> None:
    import comfy.clip_vision
    import comfy.utils
    import transformers
    from ComfyUI_IDAdapter.nodes.host.vision import encode_heads

    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CONFIG))
    recipe.fill(model, 0, "vision.")
    save_vision(model, tmp_path)
    heads = [np.random.default_rng(k).integers(0, 256, (90, 90, 3)).astype(np.uint8) for k in range(2)]
    encoder = load_vision(tmp_path)
    patches, classes = encoder(preprocess(heads, encoder.side))
    assert patches.shape == (2, 64, 128)
    theirs = comfy.clip_vision.ClipVisionModel(json.loads((tmp_path / CONFIG_FILE).read_text("utf-8")))
    missing, unexpected = theirs.load_sd(comfy.utils.load_torch_file(str(tmp_path / WEIGHTS)))
    assert not missing
    assert not unexpected
    found_patches, found_classes = encode_heads(theirs, heads)
    torch.testing.assert_close(found_patches, patches, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found_classes, classes, atol=1e-3, rtol=1e-3)
