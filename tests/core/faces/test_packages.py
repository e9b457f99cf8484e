from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest

from idadapter_core.errors import FacePackageError
from idadapter_core.faces.packages import (
    DETECTION,
    GENDER_AGE,
    RECOGNITION,
    find_packages,
    read_package,
    read_signature,
    resolve_package,
)


def test_files_are_sorted_by_what_they_do(package: Path) -> None:
    assert {task: path.name for task, path in read_package(package).models.items()} == {
        DETECTION: "det_10g.onnx",
        RECOGNITION: "w600k_r50.onnx",
        GENDER_AGE: "genderage.onnx",
    }


def test_signature_is_what_the_runtime_reports(package: Path) -> None:
    for path in package.glob("*.onnx"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for ours, theirs in zip(
            read_signature(path), (session.get_inputs(), session.get_outputs()), strict=True
        ):
            expected = [tuple(d if isinstance(d, int) else None for d in item.shape) for item in theirs]
            assert ours == expected, path.name


class TestSearch:
    def test_first_root_wins_and_both_layouts_are_known(self, package: Path, tmp_path: Path) -> None:
        first, second = tmp_path / "comfy", tmp_path / "home"
        for folder in (
            first / "models" / "buffalo_l",
            second / "models" / "buffalo_l",
            second / "antelopev2",
        ):
            shutil.copytree(package, folder)
        found = find_packages([first, second, tmp_path / "absent"])
        assert found == {
            "buffalo_l": first / "models" / "buffalo_l",
            "antelopev2": second / "antelopev2",
        }

    def test_package_unpacked_one_level_too_deep(self, package: Path, tmp_path: Path) -> None:
        shutil.copytree(package, tmp_path / "models" / "antelopev2" / "antelopev2")
        assert find_packages([tmp_path]) == {"antelopev2": tmp_path / "models" / "antelopev2" / "antelopev2"}

    def test_empty_folders_and_loose_files_are_no_packages(self, package: Path, tmp_path: Path) -> None:
        (tmp_path / "models" / "buffalo_l").mkdir(parents=True)
        shutil.copy(package / "genderage.onnx", tmp_path / "models" / "inswapper_128.onnx")
        assert find_packages([tmp_path]) == {}

    def test_missing_package_names_the_folders_and_the_way_out(self, package: Path, tmp_path: Path) -> None:
        shutil.copytree(package, tmp_path / "models" / "buffalo_l")
        assert resolve_package("buffalo_l", [tmp_path]) == tmp_path / "models" / "buffalo_l"
        with pytest.raises(FacePackageError) as caught:
            resolve_package("antelopev2", [tmp_path])
        message = str(caught.value)
        for part in (
            "'antelopev2' was not found",
            str(tmp_path / "models" / "antelopev2"),
            "Found instead: buffalo_l",
            "glintr100.onnx",
            "github.com/deepinsight/insightface",
            "non-commercial research only",
        ):
            assert part in message


class TestBadPackages:
    def test_absent(self, tmp_path: Path) -> None:
        with pytest.raises(FacePackageError, match="does not exist"):
            read_package(tmp_path / "nowhere")

    def test_empty(self, tmp_path: Path) -> None:
        with pytest.raises(FacePackageError, match="is empty .*interrupted download.*det_10g.onnx"):
            read_package(tmp_path)

    def test_folder_of_packages(self, package: Path) -> None:
        with pytest.raises(
            FacePackageError, match=f"holds face packages, and is none itself: name .*{package.name}"
        ):
            read_package(package.parent)

    def test_without_detector(self, package: Path, tmp_path: Path) -> None:
        shutil.copy(package / "w600k_r50.onnx", tmp_path)
        with pytest.raises(
            FacePackageError, match=r"no face detector.*found w600k_r50\.onnx \(recognition\)"
        ):
            read_package(tmp_path)

    @pytest.mark.parametrize("keep", [0, 3, 1000, 20_000])
    def test_truncated_file(self, package: Path, tmp_path: Path, keep: int) -> None:
        folder = Path(shutil.copytree(package, tmp_path / "p"))
        data = (folder / "det_10g.onnx").read_bytes()
        (folder / "det_10g.onnx").write_bytes(data[:keep])
        with pytest.raises(
            FacePackageError, match=rf"det_10g\.onnx \({keep:,} bytes\) is not a complete ONNX model"
        ):
            read_package(folder)

    def test_web_page_instead_of_a_model(self, package: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(package, tmp_path / "p"))
        (folder / "genderage.onnx").write_text("<!DOCTYPE html><html><body>rate limit</body></html>")
        with pytest.raises(FacePackageError, match=r"genderage\.onnx .*not a complete ONNX model"):
            read_package(folder)

    @pytest.mark.parametrize("manifest", ["{", json.dumps({"manifest_version": 2, "tasks": ["detection"]})])
    def test_broken_manifest(self, package: Path, tmp_path: Path, manifest: str) -> None:
        folder = Path(shutil.copytree(package, tmp_path / "p"))
        (folder / "manifest.json").write_text(manifest)
        with pytest.raises(FacePackageError, match=r"manifest\.json.*Get the package again"):
            read_package(folder)


def test_a_folder_that_may_not_be_read_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a container's user meets it under somebody else's home. Root may read everything, so the refusal is simulated."""
    readable = tmp_path / "open" / "models" / "buffalo_l"
    readable.mkdir(parents=True)
    (readable / "det.onnx").touch()
    closed = tmp_path / "closed" / "models"
    closed.mkdir(parents=True)
    iterdir = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert find_packages([tmp_path / "closed", tmp_path / "open"]) == {"buffalo_l": readable}
    assert "left out" in caplog.text
