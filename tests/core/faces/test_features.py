from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from idadapter_core.errors import FaceError, FacePackageError, InputError, NoFaceFoundError, RecognizerError
from idadapter_core.faces.align import align_face
from idadapter_core.faces.detector import FaceAnalyzer, Search, open_analyzer
from idadapter_core.faces.features import crops_to_tensor, extract_features
from idadapter_core.faces.images import Origin
from idadapter_core.faces.iresnet import IResNet, digest
from tests.golden.recipe import fill
from tests.tiny.face_package import MarkedFace, synthesize

SMALL, LARGE = MarkedFace(150, 200, 60, identity=1), MarkedFace(420, 320, 80, identity=2, score=0.8)
ONE = synthesize(faces=[SMALL])
TWO = synthesize(768, 1024, [SMALL, LARGE])
NOBODY = synthesize(768, 1024)
CUT, WHOLE, ALSO_CUT = MarkedFace(320, 320, 100), MarkedFace(650, 370, 60), MarkedFace(1192, 320, 100)


@pytest.fixture(scope="module")
def recognizer() -> IResNet:
    net = IResNet((1, 1, 1, 1))
    fill(net, seed=11)
    return net


def test_package_recogniser_gives_embeddings_without_stages(analyzer: FaceAnalyzer) -> None:
    result = extract_features([ONE, TWO], analyzer, None)
    features = result.features
    assert features.embedding.shape == (2, 512)
    assert features.embedding.dtype == torch.float32
    assert features.stages == ()
    assert features.recognizer == analyzer.recognizer_digest
    assert [face.image_index for face in features.faces] == [0, 1]
    expected = analyzer.embed(align_face(TWO, features.faces[1].landmarks))
    np.testing.assert_array_equal(features.embedding[1].numpy(), expected)
    assert features.crops is not None
    assert features.crops.shape == (2, 3, 112, 112)
    assert torch.isfinite(features.crops).all()
    assert features.crops.abs().max() <= 1


def test_own_recogniser_sees_the_aligned_rgb_crop(analyzer: FaceAnalyzer, recognizer: IResNet) -> None:
    result = extract_features([ONE, TWO], analyzer, recognizer, recognizer_digest=digest(recognizer))
    features = result.features
    assert features.recognizer == digest(recognizer)
    assert [stage.shape[1] for stage in features.stages] == [64, 128, 256, 512]
    crop = align_face(ONE, features.faces[0].landmarks)
    pixels = torch.from_numpy(crop.astype(np.float32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        embedding, stages = recognizer((pixels / 255 - 0.5) / 0.5)
    torch.testing.assert_close(features.embedding[:1], embedding, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.stages[3][:1], stages[3], atol=1e-4, rtol=1e-4)
    assert not features.embedding.requires_grad


def test_many_faces_are_recognised_in_parts(analyzer: FaceAnalyzer) -> None:
    sizes = []

    def recognizer(crops: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        sizes.append(len(crops))
        return crops.mean((2, 3)), [crops[:, :, :2, :2]]

    result = extract_features([TWO] * 9, analyzer, recognizer, select="all")
    assert max(sizes) <= 16
    assert result.features.crops is not None
    torch.testing.assert_close(result.features.embedding, result.features.crops.mean((2, 3)))
    assert result.features.stages[0].shape == (18, 3, 2, 2)


def test_selection_decides_whose_features(analyzer: FaceAnalyzer) -> None:
    by_size = [extract_features([TWO], analyzer, None, index=i) for i in range(2)]
    assert by_size[0].features.faces[0].width > by_size[1].features.faces[0].width
    leftmost = extract_features([TWO], analyzer, None, select="left to right")
    torch.testing.assert_close(leftmost.features.embedding, by_size[1].features.embedding)
    everyone = extract_features([TWO, ONE], analyzer, None, select="all")
    assert [face.image_index for face in everyone.features.faces] == [0, 0, 1]
    assert [len(faces) for faces in everyone.chosen] == [2, 1]


def test_found_faces_are_numbered_as_index_counts(analyzer: FaceAnalyzer) -> None:
    result = extract_features([TWO], analyzer, None, index=1)
    assert result.chosen[0] == (result.found[0][1],)


def test_report_says_what_happened(analyzer: FaceAnalyzer) -> None:
    tiny = synthesize(faces=[MarkedFace(300, 300, 18)])
    report = extract_features([ONE, TWO, tiny], analyzer, None).report
    assert "image 1 of 3 (640x640): 1 face found at 640 px" in report
    assert "image 2 of 3 (768x1024): 2 faces found" in report
    assert "warning: several faces; used index 0 of 0 to 1" in report
    assert "warning: small face (45x" in report
    assert report.count("warning") == 2


def test_each_photo_and_warning_has_a_remark_that_stands_alone(analyzer: FaceAnalyzer) -> None:
    tiny = synthesize(faces=[MarkedFace(300, 300, 18)])
    result = extract_features([ONE, TWO, tiny, NOBODY], analyzer, None, on_missing="skip")
    texts = [remark.text for remark in result.remarks]
    assert [text[: len("image 1")] for text in texts] == [f"image {i}" for i in (1, 2, 2, 3, 3, 4)]
    assert [remark.is_warning for remark in result.remarks] == [False, False, True, False, True, True]
    face = result.features.faces[0]
    where = f"{face.width:.0f}x{face.height:.0f} px at ({face.box[0]:.0f}, {face.box[1]:.0f})"
    assert f"(640x640): 1 face found at 640 px; face 0: {where}, score" in texts[0]
    assert "(768x1024): 2 faces found" in texts[1]
    assert "several faces; used index 0 of 0 to 1" in texts[2]
    assert "small face (45x" in texts[4]
    assert texts[5].startswith("image 4 of 4 (768x1024): left out, no face found (looked at 640 to 128 px, ")


def test_sizes_are_those_of_the_file_where_it_is_known(analyzer: FaceAnalyzer) -> None:
    origins = [Origin("anna.jpg", 1280, 1280), None]
    result = extract_features([ONE, ONE], analyzer, None, origins=origins)
    face = result.features.faces[0]
    known, unknown = (remark.text for remark in result.remarks)
    assert known.startswith("image 1 of 2 (anna.jpg, 1280x1280, scaled to 640x640): 1 face found")
    assert f"({2 * face.width:.0f}x{2 * face.height:.0f} px in the file)" in known
    assert "in the file" not in unknown


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (Origin("anna.jpg", 3000, 1024), "It was cropped to the shape of the first photo"),
        (None, "It may have been cropped to the shape of the first photo"),
        (Origin("anna.jpg", 1536, 2048), ""),
    ],
)
def test_a_photo_without_a_face_that_was_cropped_on_its_way_is_named_for_it(
    analyzer: FaceAnalyzer, origin: Origin | None, expected: str
) -> None:
    with pytest.raises(NoFaceFoundError, match="image 2 of 2") as caught:
        extract_features([TWO, NOBODY], analyzer, None, origins=[None, origin])
    assert ("cropped to the shape" in str(caught.value)) is bool(expected)
    assert expected in str(caught.value)


def test_a_single_photo_was_cropped_by_nobody(analyzer: FaceAnalyzer) -> None:
    with pytest.raises(NoFaceFoundError, match="no face found") as caught:
        extract_features([NOBODY], analyzer, None)
    assert "crop" not in str(caught.value)


def test_progress_is_called_for_each_photo(analyzer: FaceAnalyzer) -> None:
    calls = []
    extract_features([ONE, NOBODY, ONE], analyzer, None, on_missing="skip", progress=lambda: calls.append(1))
    assert len(calls) == 3


class Stop(BaseException):
    """As an interruption in ComfyUI: no error that anybody may catch."""


def test_the_work_ends_between_two_attempts_on_one_photo(analyzer: FaceAnalyzer) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    with pytest.raises(Stop):
        extract_features([NOBODY], analyzer, None, on_missing="skip", check=check)
    assert len(calls) == 3


@pytest.mark.parametrize("is_own", [True, False])
def test_the_work_ends_between_two_calls_of_the_recogniser(analyzer: FaceAnalyzer, is_own: bool) -> None:
    chunks: list[int] = []
    photos_done: list[int] = []
    checks_after_photos: list[int] = []

    def recognizer(crops: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        chunks.append(len(crops))
        return crops.mean((2, 3)), []

    def check() -> None:
        if len(photos_done) == 20:
            checks_after_photos.append(1)
            if len(checks_after_photos) == 2:
                raise Stop

    with pytest.raises(Stop):
        extract_features(
            [ONE] * 20,
            analyzer,
            recognizer if is_own else None,
            progress=lambda: photos_done.append(1),
            check=check,
        )
    assert chunks == ([16] if is_own else [])


def test_any_form_of_image_is_read(analyzer: FaceAnalyzer) -> None:
    given = torch.from_numpy(ONE.astype(np.float32) / 255)
    result = extract_features([given], analyzer, None)
    torch.testing.assert_close(
        result.features.embedding, extract_features([ONE], analyzer, None).features.embedding
    )


class TestMissing:
    def test_error_names_the_photo(self, analyzer: FaceAnalyzer) -> None:
        expected = r"image 2 of 4 \(768x1024\): no face found \(looked at 640 to 128 px, with a border around it, at 1024 to 1280 px\)\."
        with pytest.raises(NoFaceFoundError, match=expected):
            extract_features([ONE, NOBODY, ONE, ONE], analyzer, None)

    def test_skip_goes_on_with_the_others(self, analyzer: FaceAnalyzer) -> None:
        result = extract_features([NOBODY, ONE], analyzer, None, on_missing="skip")
        assert result.chosen[0] == ()
        assert [face.image_index for face in result.features.faces] == [1]
        assert "image 1 of 2 (768x1024): skipped, no face found" in result.report

    def test_nobody_left(self, analyzer: FaceAnalyzer) -> None:
        with pytest.raises(
            NoFaceFoundError, match=r"no photo shows a usable face\.\nimage 1 of 2 .*\nimage 2 of 2"
        ):
            extract_features([NOBODY, NOBODY], analyzer, None, on_missing="skip")

    def test_index_out_of_range(self, analyzer: FaceAnalyzer) -> None:
        three = synthesize(faces=[SMALL, LARGE, MarkedFace(450, 120, 50)])
        with pytest.raises(FaceError, match=r"image 2 of 2 \(768x1024\): asked for face 3 .*found 2"):
            extract_features([three, TWO], analyzer, None, index=2)

    def test_face_mostly_outside(self, analyzer: FaceAnalyzer) -> None:
        # Cut out so tightly that eyes, nose and mouth are there, but most of the head is not.
        photo = np.ascontiguousarray(synthesize(faces=[MarkedFace(320, 320, 100)])[250:392, 256:384])
        assert len(analyzer.detect(photo)) == 1
        with pytest.raises(FaceError, match=r"image 1 of 1 \(128x142\): only \d+% of the face lies inside"):
            extract_features([photo], analyzer, None)

    def test_all_leaves_out_what_cannot_be_cut(self, analyzer: FaceAnalyzer) -> None:
        # The left face is cut as above, the right one is whole.
        photo = np.ascontiguousarray(synthesize(1000, 640, [CUT, WHOLE])[250:500, 256:])
        result = extract_features([photo], analyzer, None, select="all")
        assert len(result.found[0]) == 2
        assert result.chosen == ((result.found[0][1],),)
        assert result.features.faces == result.chosen[0]
        assert "image 1 of 1 (744x250): 2 faces found" in result.report
        assert "warning: face 0 left out, only " in result.report
        assert "several faces" not in result.report
        with pytest.raises(FaceError, match=r"only \d+% of the face lies inside"):
            extract_features([photo], analyzer, None, select="left to right")

    def test_all_without_any_face_that_can_be_cut(self, analyzer: FaceAnalyzer) -> None:
        pair = np.ascontiguousarray(synthesize(1300, 640, [CUT, ALSO_CUT])[250:392, 256:1256])
        with pytest.raises(
            FaceError, match=r"none of 2 faces can be used: face 0 left out, .*; face 1 left out"
        ):
            extract_features([pair], analyzer, None, select="all")

    def test_bad_images_are_never_skipped(self, analyzer: FaceAnalyzer) -> None:
        broken = np.full((64, 64, 3), np.nan, np.float32)
        with pytest.raises(InputError, match="image 2 of 2 .* are NaN"):
            extract_features([ONE, broken], analyzer, None, on_missing="skip")  # type: ignore[list-item]

    def test_no_images(self, analyzer: FaceAnalyzer) -> None:
        with pytest.raises(InputError, match="no images were given"):
            extract_features([], analyzer, None)

    def test_unknown_choices(self, analyzer: FaceAnalyzer) -> None:
        with pytest.raises(InputError, match="on_missing must be one of error, skip"):
            extract_features([ONE], analyzer, None, on_missing="ignore")
        with pytest.raises(InputError, match="select must be one of largest"):
            extract_features([ONE], analyzer, None, select="best")


def test_package_without_recogniser(package: Path, tmp_path: Path) -> None:
    shutil.copy(package / "det_10g.onnx", tmp_path)
    with pytest.raises(FacePackageError, match="has no recognition model"):
        extract_features([ONE], open_analyzer(tmp_path, "cpu"), None)


def test_recogniser_that_overflows(analyzer: FaceAnalyzer) -> None:
    def recognizer(crops: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.full((len(crops), 512), torch.inf), []

    with pytest.raises(RecognizerError, match="not finite"):
        extract_features([ONE], analyzer, recognizer)


def test_crops_keep_channel_order_and_range() -> None:
    crop = np.zeros((112, 112, 3), np.uint8)
    crop[..., 0], crop[..., 2] = 255, 51
    tensor = crops_to_tensor([crop])
    assert tensor[0, :, 5, 5].tolist() == pytest.approx([1, -1, -0.6])


class TestAdvice:
    """What to do about a photo in which no face was found."""

    def refusal(self, analyzer: FaceAnalyzer, *photos: np.ndarray) -> str:
        with pytest.raises(NoFaceFoundError) as refused:
            extract_features(list(photos), analyzer, None)
        return str(refused.value)

    @pytest.mark.parametrize(("width", "height"), [(800, 400), (400, 800), (1100, 1000)])
    def test_a_wide_or_large_photo_is_to_be_cropped(
        self, analyzer: FaceAnalyzer, width: int, height: int
    ) -> None:
        message = self.refusal(analyzer, synthesize(width, height))
        assert message.startswith(
            f"image 1 of 1 ({width}x{height}): no face found (looked at 640 to 128 px, "
        )
        assert "Crop the photo to head and shoulders" in message
        assert "batch" not in message

    def test_a_small_square_one_is_not(self, analyzer: FaceAnalyzer) -> None:
        message = self.refusal(analyzer, synthesize(500, 500))
        assert "rop" not in message
        assert "upright" in message

    def test_the_step_that_found_a_face_is_reported(self, analyzer: FaceAnalyzer) -> None:
        photo = synthesize(1500, 900, [MarkedFace(1200, 270, 20)])
        extraction = extract_features([photo], analyzer, None)
        assert "image 1 of 1 (1500x900): 1 face found at 1024 px" in extraction.report
        assert "small face (" in extraction.report

    def test_a_batch_may_have_changed_the_photo(self, analyzer: FaceAnalyzer) -> None:
        photo = synthesize(faces=[MarkedFace(300, 300, 60)])
        message = self.refusal(analyzer, photo, synthesize())
        assert "image 2 of 2 (640x640): no face found" in message
        assert "may have been cropped to the shape of the first photo when they were joined" in message

    def test_a_face_of_too_few_pixels_is_told_with_its_size_in_the_photo(
        self, analyzer: FaceAnalyzer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(analyzer, "search", lambda *_: Search((), "at 640 px", 9.4))
        message = self.refusal(analyzer, synthesize())
        assert "the face in it is too small, about 9 px high; 64 px and more make a good identity" in message
        assert "cropped to head and shoulders" in message
