"""Convert and show indexes in JSON Lines, the format before Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import file_digest
from .index import CONVERTED, Index, read_embeddings, read_index, root_of, write_index
from .jsonl import Lines, is_lines
from .rows import STATUSES, Row


def convert(source: Path, output: Path) -> Index:
    """Convert an index from JSON Lines to Parquet. Rows, embeddings and digest stay the same, so a run begun with it can continue.

    Raises:
        ConfigError: the old index or its embeddings are incomplete, or the new one cannot be written.
    """
    if not is_lines(source):
        raise ConfigError(f"{source}: is no index in JSON Lines; only those need to be converted.")
    lines = Lines(source)
    embeddings = read_embeddings(source, lines.facts)
    facts = {**lines.facts, CONVERTED: file_digest(source)}
    return write_index(output, root_of(source, lines.facts["root"]), lines.rows(), embeddings, facts)


def shown(path: Path, status: str | None = None) -> tuple[Mapping[str, Any], Iterable[Row]]:
    """The facts and the rows of an index in either format; all rows, or those with one status.

    Raises:
        ConfigError: not an index, or damaged; for JSON Lines, also while the rows are read.
    """
    if is_lines(path):
        lines = Lines(path)
        return lines.facts, (row for row in lines.rows() if status in (None, row.status))
    index = read_index(path)
    chosen = index.rows if status is None else index.rows.where(index.rows.status == STATUSES.index(status))
    return index.facts, chosen
