"""All packs in the folder that `PACKS_PATH` names, and ours, on one real server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import SERVER_FILES
from tests.golden import recipe
from tests.harness.results import difference, picture
from tests.harness.server import PACK_NAME, ComfyServer
from tests.harness.uniid_graph import NONE, add_rescale, rewire, uniid_graph
from tests.harness.workflow import Graph, Node, add_text_to_image
from tests.real_packs import weights
from tests.real_packs.cases import PACKS
from tests.real_packs.hosting import FOLDER, packs_folder
from tests.real_packs.measure import measure_apart
from tests.tiny.checkpoints import CHECKPOINT_NAMES
from tests.tiny.files import ADAPTER_SD15

if packs_folder() is None:
    pytest.skip(f"{FOLDER} is not set: name a folder with checkouts of other packs", allow_module_level=True)

pytestmark = pytest.mark.server
SD15 = CHECKPOINT_NAMES["sd15"]
IPADAPTER = "tiny_sd15.safetensors"


def _packs() -> list[Path]:
    folder = packs_folder()
    assert folder is not None
    return sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file())


def _bring_ipadapter(base: Path) -> None:
    """A `Writer`: an IPAdapter for the tiny SD1.5 checkpoint, and the embeddings of a picture and of none."""
    weights.write_ipadapter(base / "models" / "ipadapter" / IPADAPTER, "sd15", {})
    embedding = recipe.value(3, "image", (1, weights.IMAGE_WIDTH))
    torch.save(embedding, base / "input" / "picture.ipadpt")
    torch.save(torch.zeros_like(embedding), base / "input" / "nothing.ipadpt")


@pytest.fixture(scope="module")
def crowded(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with ours and all of theirs."""
    packs = _packs()
    # Some packs import themselves as custom_nodes.<folder>.
    parent = tmp_path_factory.mktemp("packs")
    (parent / "custom_nodes").mkdir()
    for pack in packs:
        (parent / "custom_nodes" / pack.name).symlink_to(pack, target_is_directory=True)

    def bring_packs(base: Path) -> None:
        for pack in packs:
            link = base / "custom_nodes" / pack.name
            link.symlink_to(parent / "custom_nodes" / pack.name, target_is_directory=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(parent), prepend=":")
        with ComfyServer(comfyui, writers=[*SERVER_FILES, _bring_ipadapter, bring_packs]) as running:
            yield running


def test_ours_imports_beside_all_of_theirs(crowded: ComfyServer) -> None:
    times = re.findall(r"seconds( \(IMPORT FAILED\))?: \S*/custom_nodes/([\w.-]+)", crowded.log())
    failed = {name for mark, name in times if mark}
    assert {PACK_NAME, *(pack.name for pack in _packs())} <= {name for _, name in times}
    assert PACK_NAME not in failed
    assert f"custom_nodes.{PACK_NAME}" in {i["python_module"] for i in crowded.object_info().values()}
    # Those that fail beside ours fail alone, too.
    assert all(measure_apart(name).missing for name in failed & set(PACKS))


def _add_theirs(graph: Graph, model: Node, negative: Node, known: set[str]) -> tuple[Node, int]:
    """Their nodes on a model, as many as the server has that can be together on one; and how many."""
    count = 0
    if "IPAdapterEmbeds" in known:
        count += 1
        model = graph.add(
            "IPAdapterEmbeds",
            model=model,
            ipadapter=graph.add("IPAdapterModelLoader", ipadapter_file=IPADAPTER),
            pos_embed=graph.add("IPAdapterLoadEmbeds", embeds="picture.ipadpt"),
            neg_embed=graph.add("IPAdapterLoadEmbeds", embeds="nothing.ipadpt"),
            weight=0.5,
            weight_type="linear",
            start_at=0.0,
            end_at=1.0,
            embeds_scaling="V only",
        )
    if "NormalizedAttentionGuidance" in known:
        count += 1
        model = graph.add(
            "NormalizedAttentionGuidance",
            model=model,
            negative=negative,
            scale=2.0,
            tau=2.5,
            alpha=0.5,
            sigma_start=-1.0,
            sigma_end=-1.0,
        )
    if "Automatic CFG" in known:
        count += 1
        model = graph.add("Automatic CFG", model=model, hard_mode=True, boost=False)
    if "ADE_UseEvolvedSampling" in known:
        count += 1
        model = graph.add("ADE_UseEvolvedSampling", model=model, beta_schedule="autoselect")
    return model, count


def _picture(server: ComfyServer, *, ours_first: bool | None, scope: str = "ID adapters") -> np.ndarray:
    """The picture with theirs and, unless None is given, ours before or after."""
    known = set(server.object_info())
    if ours_first is None:
        graph = Graph()
        nodes = add_text_to_image(graph, SD15)
        model, _ = _add_theirs(graph, nodes["checkpoint"], nodes["negative"], known)
    else:
        graph, nodes = uniid_graph(kind="sd15", adapter=ADAPTER_SD15, text_branch=NONE, rescale=False)
        if ours_first:
            rescaled = add_rescale(graph, nodes["apply"], scope=scope)
            model, count = _add_theirs(graph, rescaled, nodes["negative"], known)
        else:
            theirs, count = _add_theirs(graph, nodes["checkpoint"], nodes["negative"], known)
            rewire(graph, nodes["apply"], model=theirs)
            model = add_rescale(graph, nodes["apply"], scope=scope)
        if not count:
            pytest.skip("none of the packs whose nodes this test joins is in the folder")
    rewire(graph, nodes["sampler"], model=model)
    return picture(server.run(graph.workflow).check())


@pytest.mark.parametrize("scope", ["ID adapters", "every attention patch"])
def test_one_graph_of_many_packs_in_both_orders(crowded: ComfyServer, scope: str) -> None:
    first = _picture(crowded, ours_first=True, scope=scope)
    last = _picture(crowded, ours_first=False, scope=scope)
    assert np.array_equal(first, last)
    assert difference(first, _picture(crowded, ours_first=None)) > 1


def test_a_pack_that_hides_the_model_is_named_in_the_log(crowded: ComfyServer) -> None:
    if "DeepCache" not in crowded.object_info():
        pytest.skip("the folder has no ComfyUI-deepcache")
    graph, nodes = uniid_graph(kind="sd15", adapter=ADAPTER_SD15, text_branch=NONE)
    cached = graph.add(
        "DeepCache",
        model=nodes["rescale"],
        cache_interval=2,
        cache_depth=3,
        start_step=0,
        end_step=1000,
    )
    rewire(graph, nodes["sampler"], model=cached)
    result = crowded.run(graph.workflow).check()
    assert "the identity did not act in this picture: ComfyUI-deepcache" in result.log
