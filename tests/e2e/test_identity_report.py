"""Identity Report in the real server, on people of the demo world, whom its face network knows."""

from __future__ import annotations

import pytest

from tests.harness.runs import RunResult
from tests.harness.server import ComfyServer
from tests.harness.workflow import Graph, Node
from tests.tiny.files import PACKAGE, RECOGNIZER

pytestmark = pytest.mark.server

PERSON, STRANGER = 5, 6


def identity_of(graph: Graph, world: Node, photos: Node) -> tuple[Node, Node]:
    """Extract Face Features and Mix Face Features of a person's photos."""
    faces = graph.add(
        "IDAdapterExtractFaces",
        image=photos[0],
        analyzer=world[4],
        select="largest",
        index=0,
        on_missing="error",
    )
    identity = graph.add(
        "IDAdapterMixFeatures", adapter=world[5], faces=faces[0], mode="auto", references=0, weights=""
    )
    return faces, identity


def scene(graph: Graph) -> dict[str, Node]:
    """The demo world, photos of a person, and a batch of a photo of the person and one of somebody else."""
    world = graph.add("IDAdapterLoadDemoWorld", adapter="UniID")
    photos = graph.add("IDAdapterDemoPerson", person=PERSON, photos=2, size=256)
    more = graph.add("IDAdapterDemoPerson", person=PERSON, photos=3, size=256)
    third = graph.add("ImageFromBatch", image=more[0], batch_index=2, length=1)
    other = graph.add("IDAdapterDemoPerson", person=STRANGER, photos=1, size=256)
    nobody = graph.add("EmptyImage", width=256, height=256, batch_size=1, color=0)
    batch = graph.add("ImageBatch", image1=other[0], image2=third[0])
    batch = graph.add("ImageBatch", image1=batch[0], image2=nobody[0])
    faces, identity = identity_of(graph, world, photos)
    return {"world": world, "batch": batch, "faces": faces, "identity": identity}


def judged(server: ComfyServer, graph: Graph, **inputs: object) -> tuple[Node, RunResult]:
    report = graph.add("IDAdapterReport", **inputs)
    return report, server.run(graph.workflow)


def sentences(node: Node, result: RunResult) -> list[str]:
    return [entry["text"] for entry in result.check().outputs[node.id]["idadapter"]]


def test_the_person_is_told_from_somebody_else(server: ComfyServer) -> None:
    graph = Graph()
    nodes = scene(graph)
    report, result = judged(
        server, graph, images=nodes["batch"][0], analyzer=nodes["world"][4], faces=nodes["faces"][0]
    )
    said = sentences(report, result)
    assert said[0].startswith("best: picture 2 with similarity 0.")
    assert said[1].startswith("1 of 3 pictures show no face")
    (chart,) = result.images_by_node[report.id]
    assert chart.width > 400


def test_an_identity_from_a_file_serves_as_well(server: ComfyServer) -> None:
    graph = Graph()
    nodes = scene(graph)
    saved = graph.add("IDAdapterSaveIdentity", identity=nodes["identity"][0], name="for the report")
    server.run(graph.workflow).check()
    loaded = graph.add(
        "IDAdapterLoadIdentity", identity="for the report.safetensors", adapter=nodes["world"][5]
    )
    assert saved.id
    report, result = judged(
        server, graph, images=nodes["batch"][0], analyzer=nodes["world"][4], identity=loaded[0]
    )
    said = sentences(report, result)
    assert said[0].startswith("best: picture 2 with similarity 0.")
    assert any("the bands are rough" in sentence for sentence in said)


def test_a_second_recogniser_judges_the_same_faces(server: ComfyServer) -> None:
    graph = Graph()
    nodes = scene(graph)
    second = graph.add("IDAdapterLoadFaceAnalyzer", package=PACKAGE, recognizer=RECOGNIZER, provider="cpu")
    report, result = judged(
        server,
        graph,
        images=nodes["batch"][0],
        analyzer=nodes["world"][4],
        faces=nodes["faces"][0],
        independent=second[0],
    )
    preview = graph.add("PreviewAny", source=report[3])
    told = server.run(graph.workflow).check().outputs[preview.id]["text"][0]
    assert result.error is None
    assert told.count("by the independent recogniser") == 2


@pytest.mark.parametrize(
    ("wired", "said"),
    [
        ((), "nothing is wired"),
        (("faces", "identity"), "both are wired"),
        (("faces", "same"), "has the same face recogniser"),
        (("identity", "second"), "needs the photos"),
        (("identity", "other analyzer"), "cannot be compared"),
    ],
)
def test_what_cannot_be_compared_is_said(server: ComfyServer, wired: tuple[str, ...], said: str) -> None:
    graph = Graph()
    nodes = scene(graph)
    other = graph.add("IDAdapterLoadFaceAnalyzer", package=PACKAGE, recognizer=RECOGNIZER, provider="cpu")
    links = {"faces": nodes["faces"][0], "identity": nodes["identity"][0]}
    inputs = {name: link for name, link in links.items() if name in wired}
    if "same" in wired:
        inputs["independent"] = nodes["world"][4]
    if "second" in wired:
        inputs["independent"] = other[0]
    analyzer = other[0] if "other analyzer" in wired else nodes["world"][4]
    report, result = judged(server, graph, images=nodes["batch"][0], analyzer=analyzer, **inputs)
    assert result.error is not None
    assert result.error.node_id == report.id
    assert said in result.error.message


def test_between_two_people_the_likeness_follows_the_ratio(server: ComfyServer) -> None:
    """Merge Identities, measured by the identities that the report compares with."""
    graph = Graph()
    nodes = scene(graph)
    world = nodes["world"]
    photos = graph.add("IDAdapterDemoPerson", person=STRANGER, photos=2, size=256)
    _, other = identity_of(graph, world, photos)
    shown = {}
    for ratio in (0.0, 0.5, 1.0):
        merged = graph.add(
            "IDAdapterMergeIdentities", identity_a=nodes["identity"][0], identity_b=other[0], ratio=ratio
        )
        report = graph.add("IDAdapterReport", images=photos[0], analyzer=world[4], identity=merged[0])
        shown[ratio] = graph.add("PreviewAny", source=report[2])
    result = server.run(graph.workflow).check()
    found = {ratio: float(result.outputs[node.id]["text"][0]) for ratio, node in shown.items()}
    assert found[0.0] + 0.1 < found[0.5] < found[1.0] - 0.1
