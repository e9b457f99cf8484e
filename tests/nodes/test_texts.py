"""What users read agrees with the nodes: tooltips, help pages, the English locale, the README and the pages of docs."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.harness import locales
from tests.harness.comfy import REPOSITORY, pack_nodes

HELP = REPOSITORY / "web" / "docs"
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
TROUBLESHOOTING = DOCS / "troubleshooting.md"
HELP_PAGES = sorted(HELP.glob("*.md"))
NODE_IDS = [path.stem for path in HELP_PAGES]
DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *HELP_PAGES, *sorted(DOCS.rglob("*.md"))]
SHORTEST_QUOTE = 8  # shorter pieces between values say nothing


@pytest.fixture(scope="module")
def schemas(pack: ModuleType) -> dict[str, Any]:
    return {node_id: node.GET_SCHEMA() for node_id, node in pack_nodes().items()}


def test_every_node_has_a_help_page(schemas: dict[str, Any]) -> None:
    assert sorted(schemas) == NODE_IDS


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_everything_on_a_node_is_explained(schemas: dict[str, Any], node_id: str) -> None:
    schema = schemas[node_id]
    assert schema.display_name
    assert schema.description
    silent = [entry.id for entry in (*schema.inputs, *schema.outputs) if not entry.tooltip]
    assert silent == []


def explained(page: str, section: str) -> list[str]:
    """What the paragraphs in a section of a help page are about: their bold beginnings, without backticks."""
    match = re.search(rf"^## {section}s?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert match, f"no section {section}"
    return re.findall(r"^\*\*`([^`]+)`\*\*:", match[1], re.MULTILINE)


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_the_help_page_lists_inputs_and_outputs(schemas: dict[str, Any], node_id: str) -> None:
    schema = schemas[node_id]
    page = (HELP / f"{node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    assert explained(page, "Input") == [entry.id for entry in schema.inputs]
    assert explained(page, "Output") == [entry.display_name or entry.io_type for entry in schema.outputs]


@pytest.mark.parametrize("path", sorted(locales.FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_the_english_locale_is_that_of_the_nodes(schemas: dict[str, Any], path: Path) -> None:
    assert path.read_text(encoding="utf-8") == locales.files()[path], (
        "run `python -m tests.harness.locales` to write it anew"
    )


def test_the_frontend_shows_the_locale_as_it_is() -> None:
    # In the frontend's message format these would begin a placeholder, a link or a plural form.
    text = (locales.FOLDER / "nodeDefs.json").read_text(encoding="utf-8")
    values = re.findall(r': "(.*)",?$', text, re.MULTILINE)
    assert len(values) > 100
    assert [value for value in values if re.search(r"[{}@|]", value)] == []


@cache
def messages() -> tuple[str, ...]:
    """Every text in the code of the nodes and the core; values in it appear as …"""
    found = []
    for folder in ("nodes", "idadapter_core"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def quotes(document: str) -> list[str]:
    """The messages that a document quotes where it says what can go wrong: at the beginning of a paragraph, or first in a table."""
    sections = re.findall(
        r"^## (?:If it stops|When something goes wrong)\n(.*?)(?=^## |\Z)", document, re.MULTILINE | re.DOTALL
    )
    text = "\n".join(sections)
    cells = re.findall(r"^\|(.*?)(?<!\\)\|", text, re.MULTILINE)
    beginnings = re.findall(r"^\*\*(.+?)\*\*:", text, re.MULTILINE | re.DOTALL)
    return [
        " ".join(quote.split()) for part in (*cells, *beginnings) for quote in re.findall(r"`([^`]+)`", part)
    ]


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_a_help_page_fits_a_narrow_panel(node_id: str) -> None:
    """The panel is 270 pixels wide: a table shows its first column only."""
    page = (HELP / f"{node_id}.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("|")] == []


@pytest.mark.parametrize("path", [TROUBLESHOOTING, *HELP_PAGES], ids=lambda path: path.stem)
def test_quoted_messages_are_real(path: Path) -> None:
    found = quotes(path.read_text(encoding="utf-8"))
    assert found
    invented = []
    for quote in found:
        pieces = [piece for piece in re.split(r"…|[\d/]+", quote) if len(piece) >= SHORTEST_QUOTE] or [quote]
        if not any(all(piece in message for piece in pieces) for message in messages()):
            invented.append(quote)
    assert invented == []


def test_the_readme_names_every_node(schemas: dict[str, Any]) -> None:
    text = README.read_text(encoding="utf-8")
    assert [schema.display_name for schema in schemas.values() if schema.display_name not in text] == []


def test_the_readme_lists_the_files_of_the_workflow() -> None:
    text = README.read_text(encoding="utf-8")
    workflow = json.loads((REPOSITORY / "workflows" / "uniid_sdxl.json").read_text(encoding="utf-8"))
    values = [
        value
        for node in workflow["nodes"]
        for value in node.get("widgets_values") or []
        if isinstance(value, str)
    ]
    files = [value for value in values if re.fullmatch(r"[\w./-]+\.(?:safetensors|pth|bin)", value)]
    assert len(files) == 4
    for file in files:
        folder, _, name = file.rpartition("/")
        assert f"`{name}`" in text
        assert f"idadapter/{folder}/`" in text or not folder


def test_the_front_page_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)#]+)\)", index))
    assert sorted(path.name for path in DOCS.glob("*.md") if path.name not in {*linked, "README.md"}) == []


def anchors(path: Path) -> set[str]:
    """What links may name in a page: its headings."""
    text = path.read_text(encoding="utf-8")
    return {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]

    def leads(target: str) -> bool:
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        return page.exists() and (not anchor or anchor in anchors(page))

    assert [target for target in targets if not leads(target)] == []
