"""What `auto` means: the only file, the usual one, or a sentence that says what to do."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from idadapter_core.faces.iresnet import IResNet, digest
from idadapter_core.methods import METHODS


@pytest.fixture
def models(tmp_path: Path, pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder of a user."""
    import folder_paths

    folders = {
        "idadapter": tmp_path / "idadapter",
        "idadapter_recognizers": tmp_path / "idadapter" / "recognizers",
        "clip_vision": tmp_path / "clip_vision",
        "insightface": tmp_path / "insightface",
    }
    for name, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, name, ([str(folder)], {".safetensors", ".bin", ".pth"})
        )
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return tmp_path


def choices() -> Any:
    from ComfyUI_IDAdapter.nodes.host import choices as found

    return found


def put(models: Path, *names: str) -> None:
    for name in names:
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).write_bytes(b"weights")


def adapter(method: str, **config: Any) -> Any:
    kind = METHODS[method]
    return SimpleNamespace(name="mine.safetensors", kind=kind, config=kind.config(**config))


def refusal(call: Any, *arguments: Any) -> str:
    from ComfyUI_IDAdapter.idadapter_core.errors import InputError

    with pytest.raises(InputError) as caught:
        call(*arguments)
    return str(caught.value)


def test_the_only_adapter_is_taken_with_the_text_branch_beside_it(models: Path) -> None:
    put(models, *(f"idadapter/uniid/{branch}_branch/pytorch_model.bin" for branch in ("adapter", "text")))
    found = choices().adapter_file("auto")
    assert Path(found).parts == ("uniid", "adapter_branch", "pytorch_model.bin")
    beside = choices().text_branch("auto", found)
    assert Path(beside).parts == ("uniid", "text_branch", "pytorch_model.bin")
    assert choices().text_branch("none", found) is None
    assert choices().text_branch("other.bin", found) == "other.bin"


def test_an_adapter_outside_such_folders_has_no_text_branch_of_its_own(models: Path) -> None:
    put(models, "idadapter/one.safetensors", "idadapter/uniid/text_branch/pytorch_model.bin")
    assert choices().adapter_file("auto") == "one.safetensors"
    assert choices().text_branch("auto", "one.safetensors") is None


def test_several_adapters_are_the_users_choice(models: Path) -> None:
    put(models, "idadapter/one.safetensors", "idadapter/two.safetensors")
    assert "one.safetensors, two.safetensors. Choose one of them as `adapter`" in refusal(
        choices().adapter_file, "auto"
    )
    assert choices().adapter_file("two.safetensors") == "two.safetensors"


def test_no_adapter_says_which_file_belongs_where(models: Path) -> None:
    said = refusal(choices().adapter_file, "auto")
    assert "there is no adapter in" in said
    assert (
        "For UniID, put pytorch_model.bin of the adapter branch from huggingface.co/pangly/UniID into" in said
    )
    assert "models/idadapter/uniid/adapter_branch" in said


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (("mine",), "mine"),
        (("antelopev2", "buffalo_l"), "buffalo_l"),
        (("antelopev2", "mine"), "antelopev2"),
        ((), "buffalo_l"),
    ],
)
def test_of_several_face_packages_the_usual_one_is_taken(
    models: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setattr(choices(), "find_packages", lambda roots: dict.fromkeys(there))
    assert choices().package("auto") == expected
    assert choices().package("named") == "named"


def test_the_face_network_is_the_one_that_the_adapter_names(models: Path) -> None:
    networks = {name: IResNet((1, 1, 1, 1), widths=(16, 16, 16, 16)) for name in ("a", "b")}
    for number, (name, network) in enumerate(networks.items()):
        torch.manual_seed(number)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
        save_file(network.state_dict(), models / "idadapter" / "recognizers" / f"{name}.safetensors")
    put(models, "idadapter/recognizers/damaged.pth")
    named = adapter("uniid", recognizer=digest(networks["b"]))
    assert choices().recognizer("auto", named) == "b.safetensors"
    assert choices().recognizer("a.safetensors", named) == "a.safetensors"
    said = refusal(choices().recognizer, "auto", adapter("uniid", recognizer="0123456789abcdef"))
    assert "needs the face network it was trained with (0123456789abcdef)" in said
    assert "none of a.safetensors, b.safetensors, damaged.pth is it" in said
    assert choices().recognizer("auto", adapter("ip_adapter", recognizer="other")) == "from package"


def test_a_published_uniid_takes_the_usual_face_network(models: Path) -> None:
    assert "iresnet100_glint360k.pth" in refusal(choices().recognizer, "auto", adapter("uniid"))
    put(models, "idadapter/recognizers/some.pth")
    assert choices().recognizer("auto", adapter("uniid")) == "some.pth"
    put(models, "idadapter/recognizers/other.pth", "idadapter/recognizers/iresnet100_Glint360k.pth")
    import folder_paths

    folder_paths.filename_list_cache.clear()
    assert choices().recognizer("auto", adapter("uniid")) == "iresnet100_Glint360k.pth"
    assert choices().recognizer("auto", adapter("ip_adapter")) == "from package"


def test_clip_vision_of_the_right_width_is_taken(models: Path) -> None:
    for name, width in (("small", 768), ("large", 1024)):
        save_file(
            {"vision_model.embeddings.class_embedding": torch.zeros(width)},
            models / "clip_vision" / f"{name}.safetensors",
        )
    assert choices().clip_vision("auto", adapter("idadapter")) == "large.safetensors"
    assert choices().clip_vision("small.safetensors", adapter("idadapter")) == "small.safetensors"
    assert choices().clip_vision("auto", adapter("uniid")) is None
    (models / "clip_vision" / "large.safetensors").unlink()
    import folder_paths

    folder_paths.filename_list_cache.clear()
    said = refusal(choices().clip_vision, "auto", adapter("idadapter"))
    assert "a CLIP vision model of width 1024" in said
    assert "none of small.safetensors is" in said
    assert "clip-vit-large-patch14.safetensors" in said
