"""The analyzer on a tiny package, through the real insightface. Also run against insightface 0.7.3."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import insightface
import numpy as np
import pytest
from insightface.app import FaceAnalysis
from skimage.data import astronaut

from idadapter_core.errors import FaceError, FacePackageError, InputError
from idadapter_core.faces.align import align_face
from idadapter_core.faces.detector import (
    POLICIES,
    FaceAnalyzer,
    choose_providers,
    open_analyzer,
    order_faces,
    select_faces,
)
from idadapter_core.types import Face
from tests.tiny.face_package import MarkedFace, paint, synthesize, write_detector

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
MAN, WOMAN = (205, 160, 140), (140, 160, 205)  # skins that the tiny package reads as male and female
TWO = (
    MarkedFace(150, 200, 60, skin=MAN, identity=1),
    MarkedFace(420, 320, 80, skin=WOMAN, identity=2, score=0.8),
)


def _insightface(package: Path, photo: np.ndarray) -> list[dict[str, np.ndarray]]:
    app = FaceAnalysis(name=str(package), providers=[CPU])
    app.prepare(ctx_id=0, det_size=(640, 640))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return app.get(np.ascontiguousarray(photo[..., ::-1]))


class TestDetect:
    def test_agrees_with_insightface(self, package: Path, analyzer: FaceAnalyzer) -> None:
        photo = synthesize(faces=TWO)
        expected = _insightface(package, photo)
        faces = analyzer.detect(photo)
        assert len(faces) == len(expected) == 2
        for face, raw in zip(faces, expected, strict=True):
            np.testing.assert_allclose(face.box, raw["bbox"], atol=1e-4)
            np.testing.assert_allclose(face.landmarks, raw["kps"], atol=1e-4)
            assert face.score == pytest.approx(float(raw["det_score"]), abs=1e-6)
            assert face.sex == raw.sex  # type: ignore[attr-defined]
            assert face.age == raw["age"]
            embedding = analyzer.embed(align_face(photo, face.landmarks))
            similarity = (
                embedding @ raw["embedding"] / np.linalg.norm(embedding) / np.linalg.norm(raw["embedding"])
            )
            assert similarity > 0.99999
            assert np.linalg.norm(embedding) == pytest.approx(np.linalg.norm(raw["embedding"]), rel=1e-3)

    def test_describes_what_was_drawn(self, analyzer: FaceAnalyzer) -> None:
        faces = analyzer.detect(synthesize(faces=TWO), image_index=3)
        assert [face.sex for face in faces] == ["M", "F"]
        for face, drawn in zip(faces, TWO, strict=True):
            np.testing.assert_allclose(face.landmarks, drawn.landmarks, atol=0.6)
            assert face.score == pytest.approx(drawn.score, abs=0.01)
            assert (face.image_index, face.image_size, face.detection_size) == (3, (640, 640), 640)
            assert face.age is not None

    def test_photograph_with_painted_landmarks(self, analyzer: FaceAnalyzer) -> None:
        photo = astronaut()
        assert analyzer.detect(photo) == []
        drawn = MarkedFace(224, 118, 44).landmarks
        (face,) = analyzer.detect(paint(photo, drawn))
        np.testing.assert_allclose(face.landmarks, drawn, atol=1)

    def test_photo_without_a_face(self, analyzer: FaceAnalyzer) -> None:
        assert analyzer.detect(synthesize()) == []

    def test_swapped_channels_show_no_face(self, analyzer: FaceAnalyzer) -> None:
        photo = synthesize(faces=TWO)
        assert len(analyzer.detect(photo)) == 2
        assert analyzer.detect(np.ascontiguousarray(photo[..., ::-1])) == []

    @pytest.mark.parametrize(
        ("eye_distance", "size"), [(60, 640), (300, 512), (340, 448), (400, 384), (450, 320)]
    )
    def test_close_up_is_found_at_the_largest_size_that_works(
        self, analyzer: FaceAnalyzer, eye_distance: float, size: int
    ) -> None:
        drawn = MarkedFace(320, 330, eye_distance)
        (face,) = analyzer.detect(synthesize(faces=[drawn]))
        assert face.detection_size == size
        np.testing.assert_allclose(face.landmarks, drawn.landmarks, atol=2)

    @pytest.mark.parametrize("scale", [1, 3])
    def test_face_at_the_edge_is_found_by_padding(self, analyzer: FaceAnalyzer, scale: int) -> None:
        # Turned so far that the nose is the rightmost dot, beyond the last place where the detector looks.
        drawn = MarkedFace(637, 300, 20, yaw=60)
        photo = synthesize(faces=[drawn]).repeat(scale, 0).repeat(scale, 1)
        for size in (640, 512, 448, 384, 320, 256, 192, 128):
            assert analyzer._detect_at(np.ascontiguousarray(photo[..., ::-1]), (size, size)) == []
        (face,) = analyzer.detect(photo)
        np.testing.assert_allclose(face.landmarks, drawn.landmarks * scale, atol=1.5 * scale)
        assert face.image_size == (640 * scale, 640 * scale)

    @pytest.mark.parametrize(
        ("width", "height", "step"),
        [
            (640, 400, "at 640 px"),
            (1500, 900, "at 1024 px"),
            (2000, 1200, "at 1280 px"),
            (4000, 1400, "at 640 px in tiles of 1024 px"),
            (1400, 4500, "at 640 px in tiles of 1125 px"),
        ],
    )
    def test_a_small_face_in_a_large_photo(
        self, analyzer: FaceAnalyzer, width: int, height: int, step: str
    ) -> None:
        drawn = MarkedFace(width * 0.8, height * 0.3, 20 if max(width, height) <= 2000 else 28)
        search = analyzer.search(synthesize(width, height, [drawn]))
        (face,) = search.faces
        assert search.step == step
        assert face.image_size == (width, height)
        assert face.detection_size == int(step.split()[1])
        np.testing.assert_allclose(face.landmarks, drawn.landmarks, atol=1.5)

    def test_each_face_in_the_tiles_is_found_once(self, analyzer: FaceAnalyzer) -> None:
        # Beside the edges of tiles, across them, where tiles overlap, and at the photo's own edge.
        drawn = [
            MarkedFace(x, y, 28)
            for x in (40, 600, 744, 1000, 1100, 1500, 2250, 3960)
            for y in (60, 376, 1000, 1350)
        ]
        photo = np.full((1400, 4000, 3), 90, np.uint8)
        for face in drawn:
            photo = paint(photo, face.landmarks)
        search = analyzer.search(photo)
        assert "tiles" in search.step
        found = [face.landmarks[2] for face in search.faces]
        assert len(found) == len(drawn)
        for face in drawn:
            assert min(abs(x - face.x) + abs(y - face.y) for x, y in found) < 3

    def test_tiles_need_a_surer_detection(self, analyzer: FaceAnalyzer) -> None:
        weak, sure = MarkedFace(500, 300, 28, score=0.55), MarkedFace(2400, 300, 28, score=0.9)
        assert analyzer.search(synthesize(4000, 1400, [weak])).faces == ()
        (face,) = analyzer.search(synthesize(4000, 1400, [weak, sure])).faces
        assert face.landmarks[2][0] == pytest.approx(2400, abs=1.5)

    def test_a_face_of_the_tiles_must_be_seen_again(
        self, analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of hundreds of looks at a photo without a face one may go wrong; not two at the same place."""
        photo = np.full((1400, 3000, 3), 90, np.uint8)
        detect = analyzer._detect_at
        real = MarkedFace(512, 300, 90)
        (wrong,) = detect(np.ascontiguousarray(synthesize(1024, 1024, [real])[..., ::-1]), (640, 640))
        looks = []

        def mistaken(bgr: np.ndarray, size: tuple[int, int]) -> list[Any]:
            looks.append(bgr.shape)
            is_tile = bgr.shape[:2] == (1024, 1024)
            return [wrong] if is_tile else detect(bgr, size)

        monkeypatch.setattr(analyzer, "_detect_at", mistaken)
        search = analyzer.search(photo)
        assert (1024, 1024, 3) in looks
        assert search.faces == ()
        assert search.step.endswith("in tiles")

    def test_a_face_of_too_few_pixels_is_told(
        self, analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        photo = synthesize(faces=[MarkedFace(300, 300, 60)])
        detect = analyzer._detect_at
        monkeypatch.setattr(
            analyzer, "_detect_at", lambda bgr, size: [f.moved((0, 0), 1 / 20) for f in detect(bgr, size)]
        )
        search = analyzer.search(photo)
        assert search.faces == ()
        assert search.too_small == pytest.approx(171 / 20, abs=2)

    def test_8k_photo(self, analyzer: FaceAnalyzer) -> None:
        drawn = MarkedFace(5000, 2000, 700, score=0.9)
        photo = paint(np.full((4320, 7680, 3), 90, np.uint8), drawn.landmarks, drawn.score)
        (face,) = analyzer.detect(photo)
        np.testing.assert_allclose(face.landmarks, drawn.landmarks, atol=8)

    @pytest.mark.parametrize("shape", [(32, 32), (32, 9000), (9000, 32)])
    def test_extreme_shapes_show_no_face(self, analyzer: FaceAnalyzer, shape: tuple[int, int]) -> None:
        assert analyzer.detect(np.zeros((*shape, 3), np.uint8)) == []

    def test_face_with_unusable_landmarks_is_left_out(self, analyzer: FaceAnalyzer) -> None:
        bad = MarkedFace(450, 450, 60, has_nan=True)
        photo = synthesize(faces=[TWO[0], bad])
        _, landmarks = analyzer._model("detection").detect(photo[..., ::-1].copy(), input_size=(640, 640))
        assert len(landmarks) == 2
        assert np.isnan(landmarks).any()
        (face,) = analyzer.detect(photo)
        np.testing.assert_allclose(face.landmarks, TWO[0].landmarks, atol=0.6)
        assert analyzer.detect(synthesize(faces=[bad])) == []

    def test_identities_are_told_apart(self, analyzer: FaceAnalyzer) -> None:
        photo = synthesize(faces=[*TWO, MarkedFace(450, 120, 50, skin=MAN, identity=1)])
        by_place = order_faces(analyzer.detect(photo), "left to right")
        one, other, one_again = (analyzer.embed(align_face(photo, face.landmarks)) for face in by_place)

        def cosine(a: np.ndarray, b: np.ndarray) -> float:
            return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

        if by_place[1].center[1] < 200:
            other, one_again = one_again, other
        assert cosine(one, one_again) > 0.95
        assert cosine(one, other) < 0.8

    def test_every_attempt_can_be_the_last(self, analyzer: FaceAnalyzer) -> None:
        class Stop(BaseException):
            pass

        attempts = []

        def check(limit: int) -> None:
            attempts.append(1)
            if len(attempts) == limit:
                raise Stop

        assert analyzer.detect(synthesize(), check=lambda: check(0)) == []
        everything = len(attempts)
        assert everything == 8 + 2 * 2
        for limit in (1, 3, everything):
            attempts.clear()
            with pytest.raises(Stop):
                analyzer.detect(synthesize(), check=lambda limit=limit: check(limit))
            assert len(attempts) == limit


class TestPackage:
    def test_opens_only_what_is_needed(self, package: Path) -> None:
        analyzer = open_analyzer(package, "cpu")
        assert sorted(analyzer._opened) == ["detection", "genderage"]
        assert sorted(open_analyzer(package, "cpu", recognition=True)._opened) == [
            "detection",
            "genderage",
            "recognition",
        ]

    def test_recognizer_digest_follows_the_file(
        self, analyzer: FaceAnalyzer, package: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(package, tmp_path / "p"))
        assert open_analyzer(folder, "cpu").recognizer_digest == analyzer.recognizer_digest
        with (folder / "w600k_r50.onnx").open("ab") as file:
            file.write(b"\0")
        assert open_analyzer(folder, "cpu").recognizer_digest != analyzer.recognizer_digest
        assert len(analyzer.recognizer_digest) == 16

    def test_without_sex_and_age(self, package: Path, tmp_path: Path) -> None:
        shutil.copy(package / "det_10g.onnx", tmp_path)
        analyzer = open_analyzer(tmp_path, "cpu")
        faces = analyzer.detect(synthesize(faces=TWO))
        assert [(face.sex, face.age) for face in faces] == [(None, None)] * 2

    def test_without_recogniser(self, package: Path, tmp_path: Path) -> None:
        shutil.copy(package / "det_10g.onnx", tmp_path)
        with pytest.raises(
            FacePackageError, match=r"has no recognition model; it has det_10g\.onnx \(detection\)"
        ):
            open_analyzer(tmp_path, "cpu", recognition=True)

    def test_damaged_model(self, package: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(package, tmp_path / "p"))
        path = folder / "genderage.onnx"
        path.write_bytes(path.read_bytes().replace(b"GlobalAveragePool", b"GlobalAveragePoop"))
        with pytest.raises(
            FacePackageError, match=r"genderage\.onnx cannot be opened as a genderage model: "
        ):
            open_analyzer(folder, "cpu")

    def test_detector_of_fixed_size(self, package: Path, tmp_path: Path) -> None:
        import onnx

        model = onnx.load(write_detector(tmp_path / "det.onnx"))
        for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_value = 320
        onnx.save(model, tmp_path / "det.onnx")
        drawn = MarkedFace(320, 330, 200)
        (face,) = open_analyzer(tmp_path, "cpu").detect(synthesize(faces=[drawn]))
        assert face.detection_size == 320
        np.testing.assert_allclose(face.landmarks, drawn.landmarks, atol=1)

    def test_package_with_a_manifest(self, package: Path, tmp_path: Path) -> None:
        models = tmp_path / "models"
        shutil.copytree(package, models)
        (tmp_path / "MODEL.LICENSE").write_text("test")
        tasks = {
            "detection": {"file": "models/det_10g.onnx"},
            "recognition": {"file": "models/w600k_r50.onnx"},
        }
        manifest = {"manifest_version": 2, "model_id": "tiny", "license": "MODEL.LICENSE", "tasks": tasks}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        if insightface.__version__.startswith("0."):
            with pytest.raises(FacePackageError, match="manifest"):
                open_analyzer(tmp_path, "cpu")
            return
        analyzer = open_analyzer(tmp_path, "cpu", recognition=True)
        photo = synthesize(faces=TWO)
        faces = analyzer.detect(photo)
        assert [face.sex for face in faces] == [None, None]
        crop = align_face(photo, faces[0].landmarks)
        expected = open_analyzer(package, "cpu").embed(crop)
        np.testing.assert_allclose(analyzer.embed(crop), expected, atol=1e-4)

    def test_missing_insightface(self, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "insightface.model_zoo", None)
        with pytest.raises(FacePackageError) as caught:
            open_analyzer(package)
        assert "python -m pip uninstall -y onnxruntime onnxruntime-gpu" in str(caught.value)
        assert "python -m pip install insightface onnxruntime" in str(caught.value)

    def test_hollow_onnxruntime(self, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # What is left when one of two installed flavours was uninstalled.
        monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
        with pytest.raises(FacePackageError, match="no attribute 'InferenceSession'"):
            open_analyzer(package)


class TestProviders:
    def test_auto_takes_cuda_only_where_there_is_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        assert choose_providers("auto", [CUDA, CPU]) == [CUDA, CPU]
        assert choose_providers("auto", [CPU]) == [CPU]
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert choose_providers("auto", [CUDA, CPU]) == [CPU]

    def test_named_providers_fall_back_to_the_cpu(self) -> None:
        assert choose_providers("cuda", [CUDA, CPU]) == [CUDA, CPU]
        assert choose_providers("cpu", [CUDA, CPU]) == [CPU]

    def test_provider_that_is_not_installed(self) -> None:
        with pytest.raises(FacePackageError, match="has no provider 'directml'; it has cpu"):
            choose_providers("directml", [CPU])

    def test_unknown_provider(self) -> None:
        with pytest.raises(InputError, match="auto or one of cpu, cuda"):
            choose_providers("npu", [CPU])

    def test_the_log_says_what_the_models_run_on(
        self, package: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, "idadapter_core"):
            open_analyzer(package, "cpu", recognition=True)
        assert caplog.messages == ["face models run on CPU"]

    def test_provider_that_does_not_start_is_reported(
        self, package: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        import onnxruntime

        if CUDA in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime brings CUDA")
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
        with caplog.at_level(logging.INFO), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            analyzer = open_analyzer(package, "cuda")
        assert analyzer.provider == CPU
        assert "face models run on CPU" in caplog.messages
        assert "onnxruntime could not start CUDA for the face models" in caplog.messages


class TestSelect:
    @pytest.fixture
    def faces(self) -> list[Face]:
        def face(x: float, y: float, size: float, score: float) -> Face:
            return Face((x, y, x + size, y + size), ((0.0, 0.0),) * 5, score, image_size=(1000, 1000))

        # By number: 0 right and sure, 1 left and large, 2 in the centre.
        return [face(900, 100, 50, 0.9), face(100, 100, 200, 0.7), face(470, 470, 60, 0.8)]

    @pytest.mark.parametrize(
        ("policy", "order"),
        [
            ("largest", [1, 2, 0]),
            ("central", [2, 1, 0]),
            ("left to right", [1, 2, 0]),
            ("by score", [0, 2, 1]),
            ("all", [1, 2, 0]),
        ],
    )
    def test_order(self, faces: list[Face], policy: str, order: list[int]) -> None:
        ordered = [faces[i] for i in order]
        assert order_faces(faces, policy) == ordered
        if policy == "all":
            assert select_faces(faces, policy, 7) == ordered
        else:
            assert [select_faces(faces, policy, i) for i in range(3)] == [[face] for face in ordered]

    @pytest.mark.parametrize("policy", POLICIES)
    def test_ties_go_to_the_left_in_any_input_order(self, faces: list[Face], policy: str) -> None:
        left = replace(faces[0], box=(400, 490, 420, 510))
        right = replace(faces[0], box=(580, 490, 600, 510))
        assert order_faces([left, right], policy) == order_faces([right, left], policy) == [left, right]

    def test_index_out_of_range(self, faces: list[Face]) -> None:
        with pytest.raises(FaceError, match=r"asked for face 3 \(index 2, largest\), found 2"):
            select_faces(faces[:2], "largest", 2)

    def test_negative_index(self, faces: list[Face]) -> None:
        with pytest.raises(InputError, match="index must be 0 .* got -1"):
            select_faces(faces, "largest", -1)

    def test_unknown_policy(self, faces: list[Face]) -> None:
        with pytest.raises(InputError, match=r"select must be one of largest, .*got 'prettiest'"):
            select_faces(faces, "prettiest")
