from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.torch import save_file

from idadapter_core.demo_world.build.onnx_files import write_onnx
from idadapter_core.errors import InputError, RecognizerError
from idadapter_core.faces.iresnet import METADATA_KEY, IResNet, digest, load_iresnet, save_iresnet
from tests.golden.compare import assert_published
from tests.golden.recipe import fill, value

GOLDEN = Path(__file__).parents[2] / "golden" / "iresnet18.safetensors"
TINY = (1, 1, 1, 1)


class _EmbeddingOnly(torch.nn.Module):
    """What arcface_torch exports: the embedding without the stages."""

    def __init__(self, net: IResNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return self.net(crops)[0]


def _export(net: IResNet, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter is the one insightface's files come from
        torch.onnx.export(
            _EmbeddingOnly(net).eval(), (torch.zeros(1, 3, 112, 112),), path, dynamo=False, opset_version=11
        )


def _hollow_state(layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """A state dict of the right shapes whose tensors take no room, in memory or in a file."""
    with torch.device("meta"):
        state = IResNet(layers).state_dict()
    return {key: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for key, tensor in state.items()}


@pytest.fixture(scope="module")
def tiny() -> IResNet:
    net = IResNet(TINY)
    fill(net, seed=3)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    return value(3, "crop", (2, 3, 112, 112)).clamp(-1, 1)


def _assert_same(first: IResNet, second: IResNet, crops: torch.Tensor, tolerance: float) -> None:
    (embedding, stages), (other_embedding, other_stages) = first(crops), second(crops)
    torch.testing.assert_close(embedding, other_embedding, atol=tolerance, rtol=0)
    for stage, other in zip(stages, other_stages, strict=True):
        torch.testing.assert_close(stage, other, atol=tolerance, rtol=0)


def test_agrees_with_the_published_network() -> None:
    with safe_open(GOLDEN, framework="pt") as file:
        metadata = file.metadata()
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    seed = int(metadata["seed"])
    net = IResNet(json.loads(metadata["layers"]))
    fill(net, seed)
    with torch.no_grad():
        embedding, stages = net(value(seed, "crop", (2, 3, 112, 112)).clamp(-1, 1))
    assert [tuple(stage.shape[1:]) for stage in stages] == [
        (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7),
    ]  # fmt: skip
    assert_published("embedding", embedding, golden["embedding"])
    for number, stage in enumerate(stages, 1):
        assert_published(f"stage {number}", stage[:, :8, :3, :3], golden[f"stage{number}_corner"])
        assert_published(f"stage {number}, means", stage.mean((2, 3)), golden[f"stage{number}_mean"])


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_pickled_file_loads_exactly(tiny: IResNet, crops: torch.Tensor, tmp_path: Path, suffix: str) -> None:
    torch.save(tiny.state_dict(), tmp_path / f"net{suffix}")
    loaded = load_iresnet(tmp_path / f"net{suffix}", layers=TINY)
    _assert_same(tiny, loaded, crops, 0)
    assert digest(loaded) == digest(tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_own_file_declares_its_layers_and_loads_as_float32(
    tiny: IResNet, tmp_path: Path, dtype: torch.dtype
) -> None:
    save_iresnet(tiny, tmp_path / "net.safetensors", dtype)
    loaded = load_iresnet(tmp_path / "net.safetensors")
    assert loaded.layers == TINY
    for key, tensor in loaded.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, tiny.state_dict()[key].to(dtype).float(), atol=0, rtol=0)
    assert (digest(loaded) == digest(tiny)) == (dtype == torch.float32)


@pytest.mark.parametrize("layers", [TINY, (1, 2, 3, 1)])
def test_onnx_file_computes_the_same(crops: torch.Tensor, tmp_path: Path, layers: tuple[int, ...]) -> None:
    net = IResNet(layers)
    fill(net, seed=5)
    _export(net, tmp_path / "net.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert operators.count("BatchNormalization") < sum(layers) * 3, "nothing was folded, so nothing is tested"
    loaded = load_iresnet(tmp_path / "net.onnx", layers=layers)
    with torch.no_grad():
        _assert_same(net, loaded, crops, 2e-5)


def test_stays_frozen_in_eval_mode_but_passes_gradients_to_the_crop(
    tiny: IResNet, crops: torch.Tensor, tmp_path: Path
) -> None:
    save_iresnet(tiny, tmp_path / "net.safetensors", torch.float32)
    loaded = load_iresnet(tmp_path / "net.safetensors")
    torch.nn.Sequential(loaded).train()
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    image = crops[:1].clone().requires_grad_()
    loaded(image)[0].sum().backward()
    assert image.grad is not None
    assert image.grad.abs().max() > 0


def test_full_size_network_is_accepted_without_being_asked_for(tmp_path: Path) -> None:
    torch.save(_hollow_state((3, 13, 30, 3)), tmp_path / "backbone.pth")
    assert load_iresnet(tmp_path / "backbone.pth").layers == (3, 13, 30, 3)


def test_other_depth_is_refused_with_both_counts(tmp_path: Path) -> None:
    torch.save(_hollow_state((3, 4, 14, 3)), tmp_path / "w600k_r50.pth")
    with pytest.raises(
        RecognizerError, match="w600k_r50.pth has 3/4/14/3 blocks.*3/13/30/3 are needed.*IResNet-50"
    ):
        load_iresnet(tmp_path / "w600k_r50.pth")
    with pytest.raises(RecognizerError, match="3/4/14/3 blocks.*1/1/1/1 are needed"):
        load_iresnet(tmp_path / "w600k_r50.pth", layers=TINY)


def test_small_onnx_is_refused_by_default(tiny: IResNet, tmp_path: Path) -> None:
    _export(tiny, tmp_path / "net.onnx")
    with pytest.raises(RecognizerError, match="1/1/1/1 blocks.*3/13/30/3 are needed"):
        load_iresnet(tmp_path / "net.onnx")


class TestBadFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(RecognizerError, match=r"not found: .*nowhere\.pth"):
            load_iresnet(tmp_path / "nowhere.pth")

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "net.gguf").write_bytes(b"GGUF")
        with pytest.raises(
            RecognizerError, match=r"must be one of \.bin, \.pt, \.pth, \.ckpt, \.safetensors, \.onnx"
        ):
            load_iresnet(tmp_path / "net.gguf")

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".onnx"])
    def test_truncated(self, tiny: IResNet, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"net{suffix}"
        if suffix == ".pth":
            torch.save(tiny.state_dict(), path)
        elif suffix == ".onnx":
            _export(tiny, path)
        else:
            save_iresnet(tiny, path)
        path.write_bytes(path.read_bytes()[:100_000])
        with pytest.raises(RecognizerError, match=rf"net{suffix}.*100,000 bytes.*ownload it again"):
            load_iresnet(path)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".onnx"])
    @pytest.mark.parametrize("content", [b"version https://git-lfs", b"<html>404: Not Found</html>"])
    def test_something_else(self, tmp_path: Path, suffix: str, content: bytes) -> None:
        path = tmp_path / f"net{suffix}"
        path.write_bytes(content)
        with pytest.raises(RecognizerError, match=rf"net{suffix}.*cannot be read"):
            load_iresnet(path)

    def test_pickled_objects_are_not_opened(self, tmp_path: Path) -> None:
        torch.save({"fc.weight": torch.zeros(1), "object": Fraction(1, 2)}, tmp_path / "net.pth")
        with pytest.raises(RecognizerError, match="would run code, which is never done here"):
            load_iresnet(tmp_path / "net.pth")

    def test_whole_training_state(self, tmp_path: Path) -> None:
        torch.save({"epoch": 3, "model": {}}, tmp_path / "net.pth")
        with pytest.raises(RecognizerError, match="net.pth: holds no weights"):
            load_iresnet(tmp_path / "net.pth")

    def test_unrelated_weights(self, tmp_path: Path) -> None:
        save_file({"down_blocks.0.weight": torch.zeros(2)}, tmp_path / "net.safetensors")
        with pytest.raises(RecognizerError, match="not an IResNet face recogniser.*down_blocks.0.weight"):
            load_iresnet(tmp_path / "net.safetensors")

    def test_keys_that_differ(self, tmp_path: Path) -> None:
        state = _hollow_state(TINY)
        del state["bn2.weight"]
        state["head.weight"] = torch.zeros(1)
        state["fc.bias"] = torch.zeros(128)
        torch.save(state, tmp_path / "net.pth")
        expected = (
            r"1 missing \(bn2\.weight\); 1 unexpected \(head\.weight\); "
            r"1 of another shape \(fc\.bias is \(128,\) instead of \(512,\)\)"
        )
        with pytest.raises(RecognizerError, match=expected):
            load_iresnet(tmp_path / "net.pth", layers=TINY)

    def test_unreadable_declaration(self, tmp_path: Path) -> None:
        save_file({"fc.weight": torch.zeros(2)}, tmp_path / "net.safetensors", {METADATA_KEY: "[1, 1]"})
        with pytest.raises(
            RecognizerError, match=r"metadata 'idadapter.recognizer' must read like .*\[1, 1\]"
        ):
            load_iresnet(tmp_path / "net.safetensors")

    def test_another_onnx_network(self, tmp_path: Path) -> None:
        node = helper.make_node("Relu", ["crop"], ["out"])
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in ("crop", "out")
        ]
        onnx.save(
            helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:])), tmp_path / "net.onnx"
        )
        with pytest.raises(RecognizerError, match="not an IResNet: at conv1 expected Conv, found Relu"):
            load_iresnet(tmp_path / "net.onnx")


def test_crops_of_another_size_are_refused(tiny: IResNet) -> None:
    with pytest.raises(InputError, match=r"\(B, 3, 112, 112\), got \(1, 3, 224, 224\)"):
        tiny(torch.zeros(1, 3, 224, 224))


def test_block_counts_are_checked() -> None:
    with pytest.raises(InputError, match="four block counts"):
        IResNet((1, 2))


def test_stage_widths_are_checked() -> None:
    with pytest.raises(InputError, match="four stage widths"):
        IResNet(TINY, (8, 16, 0, 8))


NARROW = (8, 8, 16, 8)


@pytest.fixture(scope="module")
def narrow() -> IResNet:
    net = IResNet(TINY, NARROW)
    fill(net, seed=4)
    return net.requires_grad_(False)


def test_narrow_network_gives_stages_of_its_widths(narrow: IResNet, crops: torch.Tensor) -> None:
    embedding, stages = narrow(crops)
    assert embedding.shape == (2, 512)
    assert [tuple(stage.shape[1:]) for stage in stages] == [(8, 56, 56), (8, 28, 28), (16, 14, 14), (8, 7, 7)]


def test_own_file_declares_its_widths(narrow: IResNet, crops: torch.Tensor, tmp_path: Path) -> None:
    save_iresnet(narrow, tmp_path / "net.safetensors", torch.float32)
    loaded = load_iresnet(tmp_path / "net.safetensors")
    assert loaded.widths == NARROW
    _assert_same(narrow, loaded, crops, 0)


def test_narrow_foreign_file_must_be_asked_for(narrow: IResNet, crops: torch.Tensor, tmp_path: Path) -> None:
    torch.save(narrow.state_dict(), tmp_path / "net.pth")
    with pytest.raises(RecognizerError, match=r"8/8/16/8 channels .* have 64/128/256/512"):
        load_iresnet(tmp_path / "net.pth", TINY)
    _assert_same(narrow, load_iresnet(tmp_path / "net.pth", any_layers=True), crops, 0)


def test_onnx_file_in_half_precision_computes_nearly_the_same(
    narrow: IResNet, crops: torch.Tensor, tmp_path: Path
) -> None:
    write_onnx(_EmbeddingOnly(narrow), torch.zeros(1, 3, 112, 112), tmp_path / "net.onnx", ["embedding"])
    assert (tmp_path / "net.onnx").stat().st_size < 2.2 * sum(p.numel() for p in narrow.parameters())
    loaded = load_iresnet(tmp_path / "net.onnx", any_layers=True)
    with torch.no_grad():
        _assert_same(narrow, loaded, crops, 5e-3)
