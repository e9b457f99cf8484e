"""Indexes of both kinds: in JSON Lines, as they were before Parquet, and of today."""

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
    """Write an index in JSON Lines as Parquet. It keeps its rows, its embeddings and its digest, so a run that was begun with it goes on.

    Raises:
        ConfigError: the old index or its embeddings are not whole, or the new one cannot be written.
    """
    if not is_lines(source):
        raise ConfigError(f"{source}: is no index in JSON Lines; only those need to be converted.")
    lines = Lines(source)
    embeddings = read_embeddings(source, lines.facts)
    facts = {**lines.facts, CONVERTED: file_digest(source)}
    return write_index(output, root_of(source, lines.facts["root"]), lines.rows(), embeddings, facts)


def shown(path: Path, status: str | None = None) -> tuple[Mapping[str, Any], Iterable[Row]]:
    """The facts and the rows of an index of either kind, those of one status or all.

    Raises:
        ConfigError: no index, or one that is damaged; in JSON Lines, also while the rows are read.
    """
    if is_lines(path):
        lines = Lines(path)
        return lines.facts, (row for row in lines.rows() if status in (None, row.status))
    index = read_index(path)
    chosen = index.rows if status is None else index.rows.where(index.rows.status == STATUSES.index(status))
    return index.facts, chosen
