"""Parts that do not belong together are refused by the node, before anything is sampled, with both names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.nodes.sampling import CONFIGS, adapter, apply, face_features, node, person, unet


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
            "sd15",
            ["TinySDXL", "11 attention sites, text width 128", "7 attention sites, text width 64"],
        ),
    ],
)
def test_adapter_of_another_model(model_kind: str, adapter_kind: str, names: list[str]) -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    with pytest.raises(MismatchError) as refused:
        apply(unet(model_kind), adapter_kind, person(adapter_kind))
    for name in [*names, adapter(adapter_kind).adapter.name]:
        assert name in str(refused.value)


def test_real_families_are_called_by_their_names() -> None:
    from ComfyUI_IDAdapter.idadapter_core.sites import family_name

    assert family_name(16, 768) == "SD1.5"
    assert family_name(16, 1024) == "SD2.1"
    assert family_name(70, 2048) == "SDXL"


def test_model_without_cross_attention() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError
    from ComfyUI_IDAdapter.nodes.host.plan import plan_of

    class Other:
        model_options: dict[str, object] = {}  # noqa: RUF012

        @staticmethod
        def model_state_dict() -> dict[str, object]:
            return {"diffusion_model.double_blocks.0.img_attn.qkv.weight": None}

    with pytest.raises(
        MismatchError, match=r"no cross-attention layers of a Stable Diffusion UNet found.*SD1.5, SD2.1, SDXL"
    ):
        plan_of(Other())


def test_identity_of_another_adapter() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError

    stranger = replace(person("sd15"), adapter="0123456789abcdef")
    with pytest.raises(MismatchError) as refused:
        apply(unet("sd15"), "sd15", stranger)
    message = str(refused.value)
    assert "0123456789abcdef" in message
    assert adapter("sd15").adapter.name in message


def test_features_of_another_recogniser() -> None:
    from ComfyUI_IDAdapter.idadapter_core.errors import MismatchError
    from ComfyUI_IDAdapter.nodes.host.memory import LoadedAdapter

    ours = adapter("sd15")
    trained = replace(ours.adapter, config=replace(ours.adapter.config, recognizer="aaaa1111"))
    features = replace(face_features(), recognizer="bbbb2222")
    with pytest.raises(MismatchError, match=r"aaaa1111.*bbbb2222"):
        node("IDAdapterMixFeatures", LoadedAdapter(trained, ours.patcher), features, "auto", 0, "")


def test_mixed_identity_belongs_to_its_adapter() -> None:
    """The whole way from features: what Mix Face Features gives, Apply ID Adapter takes."""
    identity = node("IDAdapterMixFeatures", adapter("sd15"), face_features(count=2), "auto", 0, "1, 0.5")
    assert identity.adapter_tokens.shape == (1, CONFIGS["sd15"].adapter_tokens, 64)
    apply(unet("sd15"), "sd15", identity)
