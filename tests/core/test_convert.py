"""`python -m idadapter_core.convert`, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from idadapter_core.checkpoint import load_adapter
from idadapter_core.convert import main
from tests.tiny.uniid import TINY_SD15, tiny_adapter, uniid_state, write_published

ROOT = Path(__file__).parents[2]


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path]:
    return write_published(tmp_path, uniid_state(TINY_SD15))


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "idadapter_core.convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, encoding="utf-8")


def test_says_what_a_checkpoint_is_and_writes_it(published: tuple[Path, Path], tmp_path: Path) -> None:
    adapter_file, text_file = published
    output = tmp_path / "new" / "face.safetensors"
    result = convert(adapter_file.parent, output, "--text-branch", text_file, "--dtype", "fp16")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith(
        "adapter_branch/pytorch_model.bin + text_branch/pytorch_model.bin: UniID, text and adapter"
    )
    adapter = tiny_adapter(TINY_SD15, tmp_path)
    assert f"digest {adapter.digest}" in lines
    assert lines[-1] == f"wrote {output} ({output.stat().st_size:,} bytes)"
    with safe_open(output, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
    assert load_adapter(output).config == TINY_SD15


def test_errors_go_to_stderr_without_a_traceback(tmp_path: Path) -> None:
    torch.save({"id_adapter.latents": torch.ones(1)}, tmp_path / "other.bin")
    result = convert(tmp_path / "other.bin", tmp_path / "out.safetensors")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "other.bin: this is a PuLID file: load it with a PuLID pack.\n"
    assert not (tmp_path / "out.safetensors").exists()


def test_without_output_nothing_is_written(
    published: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main([str(published[0])]) == 0
    assert "Note: it has no text branch" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("dtype", "kept"), [("keep", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_precisions(published: tuple[Path, Path], tmp_path: Path, dtype: str, kept: torch.dtype) -> None:
    assert main([str(published[1]), str(tmp_path / "out.safetensors"), "--dtype", dtype]) == 0
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {kept}  # noqa: SIM118


def test_an_existing_file_is_replaced_only_when_asked(
    published: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(SystemExit) as caught:
        main([str(published[0]), str(output)])
    assert caught.value.code == 2
    assert "out.safetensors exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"
    assert main([str(published[0]), str(output), "--overwrite"]) == 0
    digest = load_adapter(output).digest
    assert main([str(output), str(output), "--overwrite"]) == 0
    assert load_adapter(output).digest == digest


def test_the_output_must_be_safetensors(
    published: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(published[0]), str(tmp_path / "out.bin")])
    assert caught.value.code == 2
    assert "must end in .safetensors, got out.bin" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_an_error_not_a_crash(
    published: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([str(published[0]), str(tmp_path / "file" / "out.safetensors")]) == 1
    assert "out.safetensors: cannot be written" in capsys.readouterr().err


def test_recorded_recognizer_refuses_another(tmp_path: Path) -> None:
    """What a user does to have features of the wrong face network refused."""
    from dataclasses import replace

    from idadapter_core.errors import MismatchError
    from idadapter_core.faces.iresnet import IResNet, digest, save_iresnet
    from tests.tiny.features import face_features

    source, text_branch = write_published(tmp_path, uniid_state(TINY_SD15))
    network = IResNet((1, 1, 1, 1))
    save_iresnet(network, tmp_path / "net.safetensors", torch.float32)
    output = tmp_path / "adapter.safetensors"
    arguments = [source, output, "--text-branch", text_branch, "--recognizer", tmp_path / "net.safetensors"]
    assert main([str(argument) for argument in arguments]) == 0
    adapter = load_adapter(output)
    features = face_features(1)
    assert adapter.encode(replace(features, recognizer=digest(network))).adapter == adapter.digest
    with pytest.raises(MismatchError, match="was trained with the face recogniser"):
        adapter.encode(replace(features, recognizer="another"))
