"""Generate the pack's English locale from the nodes' own schemas: run `python -m tests.harness.locales`.

The texts are only written in the nodes. The frontend reads them from the files below locales/en, which are also the source of
translations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.harness.comfy import REPOSITORY, comfyui_path, pack_nodes

FOLDER = REPOSITORY / "locales" / "en"


def node_definitions() -> dict[str, Any]:
    """Content of nodeDefs.json: names, descriptions and tooltips of every node, its inputs and its outputs."""
    return {node_id: _definition(node.GET_SCHEMA()) for node_id, node in sorted(pack_nodes().items())}


def _definition(schema: Any) -> dict[str, Any]:
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {
            entry.id: {"name": entry.display_name or entry.id, "tooltip": entry.tooltip}
            for entry in schema.inputs
        },
        "outputs": {
            str(slot): {"name": entry.display_name or entry.io_type, "tooltip": entry.tooltip}
            for slot, entry in enumerate(schema.outputs)
        },
    }


def main_texts() -> dict[str, Any]:
    """Content of main.json: the menu category and the pack's own socket types."""
    schemas = [node.GET_SCHEMA() for node in pack_nodes().values()]
    sockets = {entry.io_type for schema in schemas for entry in schema.outputs if _is_own(entry)}
    return {
        "nodeCategories": {schema.category: schema.category for schema in schemas},
        "dataTypes": {name: name for name in sorted(sockets)},
    }


def _is_own(output: Any) -> bool:
    from comfy_api.latest import io

    return not any(getattr(kind, "io_type", None) == output.io_type for kind in vars(io).values())


def files() -> dict[Path, str]:
    """Path and text of every file of the English locale."""
    contents = {"main.json": main_texts(), "nodeDefs.json": node_definitions()}
    return {
        FOLDER / name: json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for name, content in contents.items()
    }


def main() -> int:
    if comfyui_path() is None:
        sys.exit("No ComfyUI found. Set COMFYUI_PATH to its folder.")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
