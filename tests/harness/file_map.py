"""Generate docs/map.md, every file of the code in one line: run `python -m tests.harness.file_map`.

A line is the first sentence of the file's docstring, with its public classes and functions.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TARGET = REPOSITORY / "docs" / "map.md"
HEAD = """# Map

Every file of the code, with its public classes and functions, to search by a word of the idea you look for. [Design](design.md) explains how
the parts belong together. This page is written by `python -m tests.harness.file_map` from the files themselves.
"""


def text() -> str:
    """The content of the page."""
    parts = [HEAD]
    for folder, files in _folders():
        parts.append(f"## {folder}\n")
        parts.append("".join(f"- `{file.name}`: {_line(file)}\n" for file in files))
    return "\n".join(parts)


def _folders() -> Iterator[tuple[str, list[Path]]]:
    """Folders with code, and their files that say what they are for."""
    found: dict[str, list[Path]] = {}
    for root in ("nodes", "idadapter_core"):
        for file in sorted((REPOSITORY / root).rglob("*.py")):
            if file.name != "__main__.py" and (
                file.name != "__init__.py" or _public(ast.parse(file.read_text(encoding="utf-8")))
            ):
                found.setdefault(file.parent.relative_to(REPOSITORY).as_posix(), []).append(file)
    yield from sorted(found.items())


def _line(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    about = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    names = _public(tree)
    return about + (f" ({', '.join(f'`{name}`' for name in names)})" if names else "")


def _public(tree: ast.Module) -> list[str]:
    """Names of the classes and functions that a file defines for others."""
    return [
        node.name
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    ]


def main() -> int:
    TARGET.write_text(text(), encoding="utf-8", newline="\n")
    print(f"wrote {TARGET.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
