"""`python -m idadapter_core convert`, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from idadapter_core.adapter import load_adapter, save_adapter
from idadapter_core.cli.convert import main
from idadapter_core.errors import MismatchError
from idadapter_core.faces.detector import open_analyzer
from idadapter_core.faces.iresnet import IResNet, digest, save_iresnet
from idadapter_core.methods.idadapter import PRESETS, parameter_counts
from tests.tiny.face_package import write_package
from tests.tiny.features import face_features
from tests.tiny.idadapter import CONFIGS, tiny_idadapter, vision_features
from tests.tiny.uniid import TINY_SD15, tiny_adapter, uniid_state, write_published

ROOT = Path(__file__).parents[2]


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path]:
    return write_published(tmp_path, uniid_state(TINY_SD15))


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "idadapter_core", "convert", *map(str, arguments)]
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
    source, text_branch = write_published(tmp_path, uniid_state(TINY_SD15))
    network = IResNet((1, 1, 1, 1))
    save_iresnet(network, tmp_path / "net.safetensors", torch.float32)
    output = tmp_path / "adapter.safetensors"
    arguments = [source, output, "--text-branch", text_branch, "--recognizer", tmp_path / "net.safetensors"]
    assert main([str(argument) for argument in arguments]) == 0
    adapter = load_adapter(output)
    features = face_features(1)
    assert adapter.encode(replace(features, recognizer=digest(network))).adapter == adapter.digest
    with pytest.raises(MismatchError, match="was trained with another face recogniser"):
        adapter.encode(replace(features, recognizer="another"))


# --- IDAdapter -------------------------------------------------------------------------------------------------------


def test_says_what_an_idadapter_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tiny_idadapter(replace(CONFIGS["sdxl"], tokens=6))
    path = tmp_path / "person.safetensors"
    save_adapter(adapter, path)
    assert main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("person.safetensors: IDAdapter, N = 4 references, ")
    assert "identity word (1 embedding) for the text encoders l 64, g 64" in lines
    counts = parameter_counts(adapter.config)
    assert set(counts) == {"mixer", "face", "resampler", "word", "gates", "deltas"}
    parts = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in counts.items())
    assert lines[-2:] == [f"parameters in M: {parts}", f"digest {adapter.digest}"]


def test_an_idadapter_is_written_in_another_precision(tmp_path: Path) -> None:
    adapter = tiny_idadapter(CONFIGS["sd15"])
    save_adapter(adapter, tmp_path / "person.safetensors")
    output = tmp_path / "half.safetensors"
    assert main([str(tmp_path / "person.safetensors"), "--dtype", "fp16", str(output)]) == 0
    half = load_adapter(output)
    assert half.config == adapter.config
    assert all(
        torch.equal(t.half(), half.state_dict()[key].half()) for key, t in adapter.state_dict().items()
    )


def test_an_idadapter_knows_the_recogniser_of_a_face_package(tmp_path: Path) -> None:
    """It reads the embedding alone, which a package's own network gives; features name that network by its file."""
    package = write_package(tmp_path / "package")
    analyzer = open_analyzer(package, "cpu", recognition=True)
    (onnx,) = [path for path in package.glob("*.onnx") if "w600k" in path.name or "glint" in path.name]
    source, output = tmp_path / "source.safetensors", tmp_path / "known.safetensors"
    save_adapter(tiny_idadapter(CONFIGS["sd15"]), source)
    assert main([str(source), str(output), "--recognizer", str(onnx)]) == 0
    adapter = load_adapter(output)
    assert adapter.config.recognizer == analyzer.recognizer_digest
    features = vision_features(1)
    assert adapter.encode(replace(features, recognizer=analyzer.recognizer_digest)).adapter == adapter.digest
    with pytest.raises(MismatchError, match="was trained with another face recogniser"):
        adapter.encode(replace(features, recognizer="another"))


def test_a_start_of_a_training_is_written(tmp_path: Path) -> None:
    """A real preset: half a gigabyte, so once, with all that can be chosen."""
    network = IResNet((1, 1, 1, 1))
    save_iresnet(network, tmp_path / "net.safetensors", torch.float32)
    output = tmp_path / "new" / "start.safetensors"
    choices = ["--references", 2, "--tokens", 16, "--unconditional", "zeros", "--seed", 7, "--dtype", "bf16"]
    result = convert("--init", "sd15", *choices, output, "--recognizer", tmp_path / "net.safetensors")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert re.match(
        r"start\.safetensors: IDAdapter, N = 2 references, \d+\.\d M parameters \(bfloat16\)$", lines[0]
    )
    assert any(line.startswith("Note: it is untrained") for line in lines)
    assert re.match(
        r"parameters in M: mixer 25\.19, face 0\.53, resampler \d.*, gates 211\.21, deltas 19\.17$", lines[-3]
    )
    assert lines[-1] == f"wrote {output} ({output.stat().st_size:,} bytes)"
    start = load_adapter(output)
    assert lines[-2] == f"digest {start.digest}"
    chosen = replace(
        PRESETS["sd15"], references=2, tokens=16, unconditional="zeros", recognizer=digest(network)
    )
    assert start.config == chosen
    assert set(start.mechanisms.openings.values()) == {(0.0, 0.0)}
    assert len(start.mechanisms.openings) == 16
    assert start.mechanisms.deltas == {}
    assert {p.dtype for p in start.layers.parameters()} == {torch.bfloat16}


@pytest.fixture
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets with the sizes of the tiny adapters."""
    for name, config in CONFIGS.items():
        monkeypatch.setitem(PRESETS, name, config)


@pytest.mark.usefixtures("tiny_presets")
@pytest.mark.parametrize("preset", PRESETS)
def test_a_start_has_the_presets_settings_unless_told_otherwise(preset: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("plain", "again", "other", "half")]
    for path, options in zip(paths, ([], ["--seed", "0"], ["--seed", "1"], ["--dtype", "fp16"]), strict=True):
        assert main([str(path), "--init", preset, *options]) == 0
    plain, again, other, half = map(load_adapter, paths)
    assert plain.config == half.config == CONFIGS[preset]
    assert again.digest == plain.digest
    assert other.digest != plain.digest
    assert {p.dtype for p in plain.layers.parameters()} == {torch.float32}
    assert {p.dtype for p in half.layers.parameters()} == {torch.float16}
    assert plain.encode(vision_features(1)).adapter == plain.digest


@pytest.mark.usefixtures("tiny_presets")
def test_settings_that_cannot_be_are_errors_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, text in (
        ("--references=0", "references must be at least 1"),
        ("--tokens=-1", "tokens must be"),
    ):
        assert main(["--init", "sd15", str(tmp_path / "start.safetensors"), option]) == 1
        shown = capsys.readouterr()
        assert text in shown.err
        assert shown.out == ""
    missing = ["--recognizer", str(tmp_path / "absent.safetensors")]
    assert main(["--init", "sd15", str(tmp_path / "start.safetensors"), *missing]) == 1
    assert "absent.safetensors" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny_presets")
def test_a_start_replaces_a_file_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "start.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(SystemExit):
        main(["--init", "sd15", str(output)])
    assert "start.safetensors exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"
    assert main(["--init", "sd15", str(output), "--overwrite"]) == 0
    assert load_adapter(output).config == CONFIGS["sd15"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "name the checkpoint to read, or add --init PRESET to write an untrained IDAdapter"),
        (["a.bin", "b.safetensors", "c"], "an input and an output at most, got 3 files"),
        (["a.bin", "--recognizer", "net.bin"], "--recognizer records a digest in the output file; name one"),
        (["a.bin", "b.bin"], "the output must end in .safetensors, got b.bin"),
        (
            ["a.bin", "--references", "2"],
            "--references is for a new adapter; add --init PRESET, or leave it out",
        ),
        (["a.bin", "--tokens", "0"], "--tokens is for a new adapter"),
        (["a.bin", "b.safetensors", "--unconditional", "zeros"], "--unconditional is for a new adapter"),
        (["a.bin", "--seed", "0"], "--seed is for a new adapter"),
        (["--init", "sd15"], "--init writes an untrained adapter; name the .safetensors file to write"),
        (["a.bin", "--init", "sd15", "b.safetensors"], "name the output alone, got 2 files"),
        (["--init", "sd15", "start.bin"], "the output must end in .safetensors, got start.bin"),
        (["--init", "sd15", "s.safetensors", "--text-branch", "a.bin"], "leave --text-branch out"),
        (["--init", "sd15", "s.safetensors", "--seed", "-1"], "--seed must be between 0 and"),
        (["--init", "sd15", "s.safetensors", "--seed", str(2**64)], f"got {2**64}"),
        (["--init", "flux", "s.safetensors"], "invalid choice: 'flux'"),
        (["--init", "sd15", "s.safetensors", "--unconditional", "none"], "invalid choice: 'none'"),
    ],
)
def test_arguments_that_contradict_each_other(
    arguments: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny_presets")
@pytest.mark.parametrize(
    "arguments",
    [
        "IN OUT --text-branch TEXT",
        "IN --text-branch TEXT OUT",
        "--text-branch TEXT IN OUT",
        "--init sd15 OUT --dtype fp32",
        "--dtype fp32 OUT --init sd15",
        "--init sd15 --dtype fp32 OUT",
    ],
)
def test_options_and_files_come_in_any_order(
    arguments: str, published: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = {"IN": published[0], "TEXT": published[1], "OUT": tmp_path / "out.safetensors"}
    assert main([str(paths.get(word, word)) for word in arguments.split()]) == 0
    written = load_adapter(paths["OUT"])
    assert written.method == ("idadapter" if "--init" in arguments else "uniid")
    assert written.config.has_text_branch
