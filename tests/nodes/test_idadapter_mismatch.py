"""IDAdapters, identities and models that do not belong together are refused by the node, before sampling, with both names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from idadapter_core.adapter import build_adapter, save_adapter
from idadapter_core.methods.idadapter import METHOD
from tests.nodes import sampling
from tests.nodes.idadapter_sampling import Made, adapter, apply, person
from tests.nodes.sampling import node, unet
from tests.tiny.checkpoints import tiny_unet
from tests.tiny.idadapter import CONFIGS, idadapter_state


@pytest.mark.parametrize(
    ("model_kind", "adapter_kind", "names"),
    [
        (
            "sd15",
            "sdxl",
            ["TinySD15", "7 attention sites, text width 64", "11 attention sites, text width 128"],
        ),
        (
            "sdxl",
            "sd21",
            ["TinySDXL", "11 attention sites, text width 128", "7 attention sites, text width 64"],
        ),
    ],
)
def test_adapter_of_another_model(model_kind: str, adapter_kind: str, names: list[str]) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    made = Made(adapter_kind)
    with pytest.raises(MismatchError) as refused:
        apply(unet(model_kind), made, person(made))
    for name in [*names, adapter(made).adapter.name]:
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"context_width": 96},
            r"made for a UNet with 7 attention sites, text width 96, this checkpoint is TinySD15: "
            r"a UNet with 7 attention sites, text width 64",
        ),
        ({"site_widths": (32, 64, 64, 64, 32, 32, 32)}, "The two differ in the widths of their layers"),
    ],
)
def test_one_size_of_the_layers_differs(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """As many sites, as SD1.5 and SD2.1 have: only the text width tells those two."""
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError
    from ComfyUI_IDAdapter.nodes.adapter import load

    config = replace(CONFIGS["sd15"], **changes)
    save_adapter(
        build_adapter(METHOD.name, config, idadapter_state(config), "tiny"), tmp_path / "mine.safetensors"
    )
    loaded = load(tmp_path / "mine.safetensors", None)
    identity = replace(person(Made("sd15")), adapter=loaded.adapter.digest)
    with pytest.raises(MismatchError, match=rf"mine\.safetensors was .*{said}"):
        node("IDAdapterApply", unet("sd15"), loaded, identity, 1.0, 0.0, 1.0, None)


def test_the_published_sizes_name_their_families() -> None:
    from ComfyUI_IDAdapter.idadapter_core.methods.idadapter import PRESETS
    from ComfyUI_IDAdapter.idadapter_core.sites import family_name

    names = {
        kind: family_name(len(preset.site_widths), preset.context_width) for kind, preset in PRESETS.items()
    }
    assert names == {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL"}


def test_identity_of_another_idadapter() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    one, two = Made("sd15"), Made("sd15", seed=3)
    with pytest.raises(MismatchError) as refused:
        apply(unet("sd15"), one, person(two))
    for name in (adapter(one).adapter.name, adapter(one).adapter.digest, adapter(two).adapter.digest):
        assert name in str(refused.value)


def test_identities_of_the_other_method() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    made = Made("sd15")
    with pytest.raises(MismatchError, match="was made with another adapter"):
        apply(unet("sd15"), made, sampling.person("sd15"))
    with pytest.raises(MismatchError, match="was made with another adapter"):
        sampling.apply(unet("sd15"), "sd15", person(made))


def test_identity_of_another_recogniser() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError
    from ComfyUI_IDAdapter.nodes.host.memory import LoadedAdapter

    made = Made("sd15")
    ours = adapter(made)
    trained = replace(ours.adapter, config=replace(ours.adapter.config, recognizer="aaaa1111"))
    identity = replace(person(made), recognizer="bbbb2222")
    loaded = LoadedAdapter(trained, ours.patcher, ours.gates)
    with pytest.raises(MismatchError, match=r"bbbb2222.*aaaa1111"):
        node("IDAdapterApply", unet("sd15"), loaded, identity, 1.0, 0.0, 1.0, None)


def test_refused_nodes_leave_the_model_alone() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    base = tiny_unet("sd15")
    made = Made("sdxl")
    with pytest.raises(MismatchError):
        apply(base, made, person(made))
    assert base.patches == {}
    assert base.additional_models == {}
    assert base.wrappers == tiny_unet("sd15").wrappers


def test_a_mask_that_is_none_and_a_window_that_is_none() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    made = Made("sd15")
    with pytest.raises(InputError, match=r"attn_mask must be a MASK"):
        apply(unet("sd15"), made, person(made), mask=torch.ones(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"start_percent \(0.6\) lies after end_percent \(0.2\)"):
        apply(unet("sd15"), made, person(made), 1.0, 0.6, 0.2)


@pytest.fixture
def compiled_elsewhere() -> Any:
    """A MODEL as nodes of other packs compile it: in place, by which the names of its weights change."""
    model = tiny_unet("sd15")
    unet = model.model.diffusion_model
    for transformer in (unet.middle_block[1], unet.input_blocks[1][1]):
        transformer.transformer_blocks[0] = torch.compile(transformer.transformer_blocks[0], backend="eager")
    assert any("_orig_mod" in key for key in model.model_state_dict())
    return model


def test_weights_that_another_nodes_compilation_hides(compiled_elsewhere: Any) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    made = Made("sd15")
    with pytest.raises(
        MismatchError,
        match="compiled by another node.*Put Apply ID Adapter before that node.*TorchCompileModel",
    ):
        apply(compiled_elsewhere, made, person(made))


def test_adapters_that_change_no_weights_act_in_a_compiled_model(compiled_elsewhere: Any) -> None:
    gated = Made("sd15", delta=0.0)
    for model in (
        apply(compiled_elsewhere, gated, person(gated)),
        sampling.apply(compiled_elsewhere, "sd15", sampling.person("sd15")),
    ):
        draws = [sampling.draw(some, "sd15") for some in (model, compiled_elsewhere)]
        assert sampling.difference(*draws) > 0.01
    plain = sampling.apply(unet("sd15"), "sd15", sampling.person("sd15"))
    applied = sampling.apply(compiled_elsewhere, "sd15", sampling.person("sd15"))
    assert sampling.difference(sampling.draw(applied, "sd15"), sampling.draw(plain, "sd15")) < 1e-5


def test_a_compiled_module_that_hides_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """WaveSpeed has compiled modules pass for what is in them."""
    from ComfyUI_IDAdapter.nodes.host.compilation import has_compiled_modules

    compiled = torch.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)), backend="eager")
    holder = torch.nn.ModuleList([torch.nn.Sequential(compiled)])
    monkeypatch.setattr(type(compiled), "modules", lambda self: self._orig_mod.modules(), raising=False)
    monkeypatch.setattr(
        type(compiled),
        "named_modules",
        lambda self, *a, **k: self._orig_mod.named_modules(*a, **k),
        raising=False,
    )
    assert not any(hasattr(module, "_orig_mod") for module in holder.modules())
    assert has_compiled_modules(holder)
    assert has_compiled_modules(compiled)
    assert not has_compiled_modules(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))
