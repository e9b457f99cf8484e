"""The doctor: what it finds in model folders, what it says is missing, and what it says of programs that do not work."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from idadapter_core import doctor
from idadapter_core.doctor import ModelFiles, Section, SelfTest, examine, self_tested, summary, text_of
from idadapter_core.errors import CheckpointError
from idadapter_core.faces.iresnet import IRESNET100_LAYERS, IResNet, save_iresnet
from idadapter_core.files import file_digest
from idadapter_core.methods import METHODS
from idadapter_core.types import Remark
from tests.golden import recipe
from tests.tiny.face_package import write_package
from tests.tiny.uniid import TINY_SD15, uniid_state, write_published

ROOT = Path(__file__).parents[2]
UNIID = METHODS["uniid"].title


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The models folder of somebody who has UniID's adapter branch, and nothing else of it."""
    folder = tmp_path / "models"
    adapter, _ = write_published(folder / "idadapter" / "uniid", uniid_state(TINY_SD15))
    shutil.rmtree(folder / "idadapter" / "uniid" / "text_branch")
    assert adapter.is_file()
    return folder


def sections(models: Path) -> dict[str, Section]:
    return {section.title: section for section in examine(ModelFiles.below(models), {})}


def lines(section: Section) -> list[str]:
    return [remark.text for remark in section.remarks]


def test_files_are_told_by_what_they_hold(models: Path) -> None:
    own = models / "idadapter"
    network = IResNet((1, 1, 1, 1))
    recipe.fill(network, 0, "iresnet.")
    (own / "recognizers").mkdir()
    save_iresnet(network, own / "recognizers" / "any name.safetensors")
    write_package(models / "insightface" / "models" / "buffalo_l", "buffalo_l")
    found = sections(models)["Model files"]
    assert found.is_ok
    adapter, recognizer, package, others = lines(found)
    assert adapter.startswith("idadapter/uniid/adapter_branch/pytorch_model.bin: UniID, adapter branch, for ")
    path = own / "uniid" / "adapter_branch" / "pytorch_model.bin"
    assert adapter.endswith(f"; {path.stat().st_size:,} bytes, SHA-256 {file_digest(path)}…")
    assert recognizer.startswith("idadapter/recognizers/any name.safetensors: an IResNet of 1/1/1/1 blocks; ")
    assert package.startswith("insightface/buffalo_l: detector det_10g.onnx, ")
    assert "recogniser w600k_r50.onnx, " in package
    assert "sex and age genderage.onnx, " in package
    assert others == "0 checkpoints, 0 CLIP vision models, 0 saved identities"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("lora.safetensors", {"x.lora_up.weight": torch.ones(1)}, "this is a LoRA: load it with Load LoRA"),
        ("cut.safetensors", None, "cut.safetensors: cannot be read (8 bytes)"),
    ],
)
def test_a_file_of_another_kind_is_named_with_advice(
    models: Path, name: str, content: dict[str, torch.Tensor] | None, said: str
) -> None:
    path = models / "idadapter" / name
    if content is None:
        path.write_bytes(b"\xff" * 8)
    else:
        save_file(content, path)
    found = sections(models)["Model files"]
    (warned,) = [remark.text for remark in found.remarks if remark.is_warning]
    assert warned.startswith(f"idadapter/{name} is not usable: ")
    assert said in warned


def test_another_recogniser_does_not_count(models: Path) -> None:
    network = IResNet((3, 4, 14, 3), (8, 8, 8, 8))
    recipe.fill(network, 0, "iresnet.")
    folder = models / "idadapter" / "recognizers"
    folder.mkdir()
    torch.save(network.state_dict(), folder / "r50.pth")
    assert IRESNET100_LAYERS != (3, 4, 14, 3)
    found = sections(models)
    (warned,) = [remark.text for remark in found["Model files"].remarks if remark.is_warning]
    assert "It looks like IResNet-50" in warned
    assert any("iresnet100" in line for line in lines(found["What each method needs"]))


def test_what_a_begun_method_lacks_is_a_warning_with_folder_page_and_licence(models: Path) -> None:
    found = sections(models)["What each method needs"]
    warned = [remark.text for remark in found.remarks if remark.is_warning]
    assert warned == [
        f"{UNIID} lacks {file.name}. Folder: models/{file.folder}. From: {file.page}. Licence: {file.licence}."
        for file in METHODS["uniid"].published
        if file.role != "adapter"
    ]
    others = [remark.text for remark in found.remarks if not remark.is_warning]
    for method in METHODS.values():
        if method.title != UNIID:
            assert sum(line.startswith(f"{method.title} lacks ") for line in others) == len(method.published)


def unet_keys(family: str) -> dict[str, torch.Tensor]:
    """The attention of a checkpoint with one block for each site, of a family's width."""
    width = {"SD1.5": 768, "SDXL": 2048}[family]
    blocks = [f"input_blocks.{n}.1" for n in (1, 2, 4, 5, 7, 8)] + ["middle_block.1"]
    blocks += [f"output_blocks.{n}.1" for n in range(3, 12)]
    depth = {"SD1.5": 1, "SDXL": 0}[family]
    if family == "SDXL":
        deep = {4: 2, 5: 2, 7: 10, 8: 10}
        blocks = [
            f"input_blocks.{n}.1.transformer_blocks.{d}" for n, count in deep.items() for d in range(count)
        ]
        blocks += [f"middle_block.1.transformer_blocks.{d}" for d in range(10)]
        up = {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}
        blocks += [
            f"output_blocks.{n}.1.transformer_blocks.{d}" for n, count in up.items() for d in range(count)
        ]
    else:
        blocks = [f"{block}.transformer_blocks.{depth - 1}" for block in blocks]
    head = "model.diffusion_model."
    return {f"{head}{block}.attn2.to_k.weight": torch.zeros(1, width) for block in blocks}


@pytest.mark.parametrize(("family", "is_enough"), [("SD1.5", False), ("SDXL", True)])
def test_a_checkpoint_counts_where_it_is_of_the_adapters_family(
    tmp_path: Path, family: str, is_enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    save_file(unet_keys(family), tmp_path / "checkpoints" / "any.safetensors")
    found = doctor._Found(ModelFiles.below(tmp_path), lambda: None)
    assert dict(found.families) == {family: 1}
    method = METHODS["uniid"]
    found.adapters.append((method, method.config()))  # as published, for SDXL
    assert found.covers(method, method.published[0]) is is_enough


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"double_blocks.0.img_attn.proj.weight": torch.zeros(2, 2)}, doctor.OTHER),
        (
            {"model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4)},
            doctor.UNKNOWN,
        ),
    ],
)
def test_a_checkpoint_of_another_kind_is_no_end(
    tmp_path: Path, tensors: dict[str, torch.Tensor], kind: str
) -> None:
    """Flux, or weights that are packed."""
    (tmp_path / "checkpoints").mkdir()
    save_file(tensors, tmp_path / "checkpoints" / "other.safetensors")
    found = doctor._Found(ModelFiles.below(tmp_path), lambda: None)
    assert dict(found.families) == {kind: 1}
    assert found.covers(METHODS["uniid"], METHODS["uniid"].published[0]) is (kind == doctor.UNKNOWN)
    assert text_of(examine(ModelFiles.below(tmp_path), {}))


@pytest.mark.parametrize(("width", "is_enough"), [(1024, True), (1280, False)])
def test_another_clip_vision_does_not_count(tmp_path: Path, width: int, is_enough: bool) -> None:
    (tmp_path / "clip_vision").mkdir()
    name = "vision_model.embeddings.class_embedding"
    save_file({name: torch.zeros(width)}, tmp_path / "clip_vision" / "any.safetensors")
    found = doctor._Found(ModelFiles.below(tmp_path), lambda: None)
    (wanted,) = [file for file in METHODS["idadapter"].published if file.role == "clip_vision"]
    assert found.covers(METHODS["idadapter"], wanted) is is_enough


def test_a_package_without_a_recogniser_is_enough_for_uniid_alone(models: Path) -> None:
    folder = models / "insightface" / "models" / "buffalo_l"
    write_package(folder, "buffalo_l")
    (folder / "w600k_r50.onnx").unlink()
    found = sections(models)
    assert any("no recogniser" in line for line in lines(found["Model files"]))
    lacking = [line for line in lines(found["What each method needs"]) if "buffalo_l" in line]
    assert lacking
    assert not any(line.startswith(UNIID) for line in lacking)


def test_files_that_may_not_be_read_are_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(doctor, "file_digest", refuse)
    (warned,) = [remark.text for remark in sections(models)["Model files"].remarks if remark.is_warning]
    assert "is not usable" in warned
    assert "Permission denied" in warned


def test_linked_folders_are_searched(models: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "big.ckpt").write_bytes(b"1")
    (models / "checkpoints").mkdir()
    (models / "checkpoints" / "SDXL").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(models / "checkpoints")
    assert list(ModelFiles.below(models).checkpoints) == ["SDXL/big.ckpt"]


def test_a_method_with_everything_says_so(models: Path) -> None:
    write_package(models / "insightface" / "models" / "buffalo_l", "buffalo_l")
    (models / "checkpoints").mkdir()
    (models / "checkpoints" / "old.ckpt").write_bytes(b"of a family that its name does not tell")
    _, text = write_published(models / "idadapter" / "uniid", uniid_state(TINY_SD15))
    assert text.is_file()
    network = IResNet((1, 1, 1, 1))
    recipe.fill(network, 0, "iresnet.")
    (models / "idadapter" / "recognizers").mkdir()
    save_iresnet(network, models / "idadapter" / "recognizers" / "r.safetensors")
    assert f"{UNIID}: everything is there" in lines(sections(models)["What each method needs"])


@pytest.fixture
def second_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second distribution of onnxruntime beside the installed one, as pip leaves it."""
    folder = tmp_path / "site" / "onnxruntime_gpu-1.2.3.dist-info"
    folder.mkdir(parents=True)
    (folder / "top_level.txt").write_text("onnxruntime\n", "utf-8")
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.2.3\n", "utf-8"
    )
    monkeypatch.syspath_prepend(str(folder.parent))


@pytest.mark.usefixtures("second_runtime")
def test_two_runtimes_are_named(tmp_path: Path) -> None:
    programs = sections(tmp_path)["Programs"]
    assert not programs.is_ok
    (warned,) = [remark.text for remark in programs.remarks if remark.is_warning]
    assert "onnxruntime-gpu 1.2.3 are both installed" in warned
    assert "python install.py" in warned


def test_a_runtime_without_sessions_is_a_warning_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))  # as an uninstall leaves it
    found = sections(tmp_path)
    assert not found["Programs"].is_ok
    assert "pip install insightface onnxruntime" in lines(found["Programs"])[-1]
    assert found["Demo world"].is_ok


def test_a_changed_file_of_the_demo_world_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "assets"
    shutil.copytree(doctor.ASSETS, copy)
    (copy / "words.json").write_text("{}", "utf-8")
    (copy / "adapters" / "uniid.safetensors").unlink()
    monkeypatch.setattr(doctor, "ASSETS", copy)
    said = lines(sections(tmp_path)["Demo world"])
    assert any(line.startswith("adapters/uniid.safetensors (uniid) is missing") for line in said)


def test_a_report_marks_warnings() -> None:
    found = Section("Programs", (Remark("one"), Remark("two", is_warning=True)))
    assert text_of([found]) == "Programs\n    one\n  ! two\n"


@pytest.mark.parametrize(("gain", "is_ok"), [(doctor.MARGIN + 0.01, True), (doctor.MARGIN - 0.01, False)])
def test_the_self_test_is_ok_above_the_margin(gain: float, is_ok: bool) -> None:
    assert self_tested(lambda: SelfTest("UniID", 0.1 + gain, 0.1, 3.0)).is_ok is is_ok


def test_a_self_test_that_cannot_run_says_why() -> None:
    def fails() -> SelfTest:
        raise CheckpointError("base.safetensors is missing; get this project again")

    def breaks() -> SelfTest:
        raise MemoryError("out of memory")

    assert self_tested(breaks).remarks[0].text == "failed: MemoryError: out of memory"
    (remark,) = self_tested(fails).remarks
    assert remark == Remark("failed: base.safetensors is missing; get this project again", is_warning=True)


def test_the_line_at_startup_counts_names_alone(models: Path) -> None:
    (models / "idadapter" / "broken.safetensors").write_bytes(b"")
    said = summary(ModelFiles.below(models))
    assert "\n" not in said
    assert said.startswith(
        f"ComfyUI-IDAdapter {doctor.own_version()}: 2 adapters, no face networks, no face packages "
    )
    assert "Missing" not in said


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "idadapter_core", "doctor", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, encoding="utf-8")


def test_the_command_reports_and_ends_with_0(models: Path) -> None:
    result = run("--models", models)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    titles = [line for line in result.stdout.splitlines() if not line.startswith(" ")]
    assert titles[:-1] == ["Programs", "Model files", "What each method needs", "Demo world"]
    assert titles[-1].startswith(f"Searched: {models} ")
    assert "    idadapter/uniid/adapter_branch/pytorch_model.bin: UniID, " in result.stdout


@pytest.mark.parametrize(
    ("option", "said"), [("--models", "no such folder"), ("--comfyui", "there is no main.py in it")]
)
def test_a_wrong_folder_is_an_error(tmp_path: Path, option: str, said: str) -> None:
    result = run(option, tmp_path / "nowhere")
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
