"""The Parquet file of an index: the format to keep, copy and read in other programs. Training reads its map (`memory_map`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..extra import require
from .columns import COLUMNS, hash_into, require_sense, schema
from .jsonl import is_lines
from .rows import BATCH

VERSION = 2  # of the Parquet file; version 1 was JSON Lines
SUFFIX = ".parquet"
_KEY = "idadapter_index"  # metadata key of the facts in the file
_DIGEST = "digest"


@dataclass(frozen=True)
class Head:
    """Header of an index, without the rows."""

    digest: str  # 16 hex digits of the facts and the rows
    facts: Mapping[str, Any]  # version, root, rows, embeddings, and further facts about the whole index


_WANTED = {"version": int, "root": str, "rows": int, "embeddings": str, _DIGEST: str}


def write_parquet(path: Path, batches: Iterable[Any], facts: Mapping[str, Any]) -> Head:
    """Write the Parquet file of an index. Raises OSError, or any error from making the batches.

    Args:
        batches: of `batch_of`, `BATCH` rows each, the last may have fewer.
        facts: plain values, including those of `_WANTED` except the digest.
    """
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    content = content_digest(facts)
    try:
        with pq.ParquetWriter(path, schema(), compression="zstd", write_page_checksum=True) as writer:
            for batch in batches:
                hash_into(content, batch)
                writer.write_batch(batch, row_group_size=BATCH)
            digest = content.hexdigest()[:16]
            writer.add_key_value_metadata({_KEY: json.dumps({**facts, _DIGEST: digest}, allow_nan=False)})
    except pa.ArrowException as error:
        raise OSError(f"{error}") from error
    return Head(digest, facts)


def content_digest(facts: Mapping[str, Any]) -> Any:
    """SHA-256 over the facts of an index, to be continued over its rows by `hash_into`."""
    return hashlib.sha256(json.dumps(facts, separators=(",", ":"), allow_nan=False).encode())


def read_head(path: Path) -> Head:
    """Read the header of an index.

    Raises:
        ConfigError: not an index, or one of another version; names the file and the next step.
    """
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    if is_lines(path):
        new = path.with_suffix(SUFFIX)
        raise ConfigError(
            f"{path}: is an index in JSON Lines, the former kind. Run `python -m idadapter_core convert-index {path} {new}` once, "
            f"and name {new.name} from then on."
        )
    try:
        found = pq.read_metadata(path, memory_map=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}). Name the index that `python -m idadapter_core scan` wrote."
        ) from error
    except pa.ArrowException as error:
        raise ConfigError(
            f"{path}: is no Parquet file, or was cut off ({error}). Name the index that `python -m idadapter_core scan` wrote, or "
            "scan again."
        ) from error
    return _head(path, found)


def _head(path: Path, found: Any) -> Head:
    try:
        facts = json.loads((found.metadata or {})[_KEY.encode()])
    except (KeyError, ValueError):
        facts = None
    if not isinstance(facts, dict) or any(type(facts.get(key)) is not kind for key, kind in _WANTED.items()):
        raise ConfigError(
            f"{path}: is a Parquet file, but no index. Name the one that `python -m idadapter_core scan` wrote."
        )
    version, rows, digest = facts["version"], facts["rows"], facts.pop(_DIGEST)
    if version != VERSION:
        advice = "Update ComfyUI-IDAdapter" if version > VERSION else "Scan again"
        raise ConfigError(f"{path}: is of version {version}, this program reads version {VERSION}. {advice}.")
    if not found.schema.to_arrow_schema().equals(schema()):
        raise ConfigError(
            f"{path}: {_difference(found.schema.to_arrow_schema())}; it was edited. Scan again."
        )
    if found.num_rows != rows:
        raise ConfigError(f"{path}: has {found.num_rows} rows, but says {rows}; it was edited. Scan again.")
    return Head(digest, facts)


def _difference(found: Any) -> str:
    """Describe how the columns of a file differ from the schema."""
    for field in schema():
        if field.name not in found.names:
            return f"the column {field.name} is missing"
        if found.field(field.name).type != field.type:
            return f"the column {field.name} must be {field.type}, it is {found.field(field.name).type}"
    extra = [name for name in found.names if name not in COLUMNS]
    return f"there is an unknown column {extra[0]}" if extra else "the columns are in another order"


def batches_of(path: Path) -> Iterator[Any]:
    """Read the rows of an index as validated record batches of `BATCH` rows.

    Raises:
        ConfigError: the file is damaged or was edited.
    """
    pa, pq = require("pyarrow"), require("pyarrow.parquet")
    first = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                for batch in table.combine_chunks().to_batches():
                    require_sense(batch, first)
                    first += len(batch)
                    yield batch
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: is damaged ({error}). Bring back a copy, or scan again.") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; it was edited. Scan again.") from error
