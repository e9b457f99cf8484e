"""Tensor files: reading safetensors and pickles, atomic writing, and digests of weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import CheckpointError

DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Choices of dtype for programs that write weights; keep: unchanged."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# torch's error message for a pickle that holds more than tensors.
_OBJECT_REFUSED = re.compile(
    r"unsupported (global|class)|can only (build|create new)|trying to call reduce", re.IGNORECASE
)


def read_tensors(path: Path, *, mapped: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a .safetensors or pickled file, on the CPU, and the safetensors metadata.

    The format is detected from the content, not from the name. Pickles are read with `weights_only=True`: a file that needs
    code to load is rejected.

    Args:
        mapped: memory-map the file. The tensors are shared between processes and take no memory until they are read. They change
            with the file, and reading them after it was truncated kills the process, so copy them immediately (see `own_weights`).
            By default tensors are read into memory, and the file may be overwritten or deleted.

    Raises:
        CheckpointError: missing, truncated, containing code, or not a flat state dict.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path.name}: no such file in {path.absolute().parent}; correct the path (in ComfyUI: refresh the node list, or choose "
            "another file)."
        )
    try:
        is_safetensors = _is_safetensors(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); make it readable, or choose another file."
        ) from error
    if is_safetensors:
        try:
            return read_safetensors(path, mapped=mapped)
        except (safetensors.SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(_unreadable(path, error)) from error
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path)
        )
    except Exception as error:  # a damaged pickle can raise anything, even IndexError or AssertionError
        if isinstance(error, pickle.UnpicklingError) and _OBJECT_REFUSED.search(str(error)):
            raise CheckpointError(
                f"{path.name}: loading this pickle would run code, which is never done here. Get the weights as .safetensors, "
                "or a .bin that holds tensors only."
            ) from error
        raise CheckpointError(_unreadable(path, error)) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name}: holds a {type(content).__name__}, not a state dict of weights.")
    flat = _flatten(content)
    if not flat:
        raise CheckpointError(f"{path.name}: holds no weights.")
    return flat, {}


def read_safetensors(path: Path, *, mapped: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a .safetensors file; `mapped` as in `read_tensors`. Raises OSError or SafetensorError."""
    with safetensors.safe_open(path, framework="pt") as file:  # also validates the layout
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    return (tensors if mapped else _read_into_memory(path, tensors)), metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a .safetensors file. Raises OSError or SafetensorError."""
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _read_into_memory(path: Path, windows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read mapped tensors into memory. Copying the mapped tensors instead would take the file's size in memory twice."""
    tensors: dict[str, Tensor] = {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for key, window in windows.items():
            tensors[key] = torch.empty_like(window, memory_format=torch.contiguous_format)
            target = tensors[key].view(-1).view(torch.uint8).numpy()
            begin, end = header[key]["data_offsets"] if key in header else (0, 0)
            file.seek(8 + length + begin)
            if end - begin != target.nbytes or file.readinto(target.data) != target.nbytes:
                raise OSError("another file took its place while it was read")
    return tensors


def own_weights(network: nn.Module) -> None:
    """Copy the weights of a CPU network out of the memory-mapped files it was loaded from, in place."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{" or path.suffix == ".safetensors"


def _unreadable(path: Path, error: Exception) -> str:
    # First sentence only: the rest is torch's guesses about its own internals.
    reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        reason = "no PyTorch weights"  # torch's message advises loading the file with code allowed
    size = path.stat().st_size
    return f"{path.name}: cannot be read ({size:,} bytes): {reason[:200]}. It is truncated or not a weights file; download it again."


def write_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a .safetensors file atomically: a failure leaves no partial file and keeps an older file of that name.

    Raises:
        CheckpointError: the file cannot be written.
    """
    # Copy tensors that share memory, which safetensors refuses to write.
    tensors = dict(tensors)
    storages: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in storages:
            tensors[key] = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
    try:
        with replacing(path) as temporary:
            temporary.touch()
            usual_mode = temporary.stat().st_mode  # safetensors creates files that only their owner can read
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
            temporary.chmod(usual_mode)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}). Choose another folder, or make this one writable and free some space."
        ) from error


class StreamedTensors:
    """A .safetensors file that is written piece by piece, so it may be larger than memory.

    Data is appended to each tensor separately, in any order of tensors. Raises OSError.

    Args:
        path: overwritten in place; see `replacing`.
        tensors: name -> dtype ("U8", "I32", "F32", ...) and shape. Wider dtypes are stored first, so that all are aligned.
        last: the name of one more tensor, of bytes, without a fixed size; "" for none.
        metadata: metadata of the file.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        last: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path = path
        self._last = last
        self._metadata = dict(metadata or {})
        self._kinds = dict(tensors)
        self._begin: dict[str, int] = {}
        self._end: dict[str, int] = {}
        end = 0
        for name, (kind, shape) in tensors.items():
            self._begin[name] = end
            end += math.prod(shape) * (8 if kind == "BOOL" else int(kind.lstrip("UIFB"))) // 8
            self._end[name] = end
        if last:
            self._begin[last], self._end[last] = end, end
        self._written = dict(self._begin)
        self._head = len(self._header(1 << 62))  # reserves more than any real header needs
        self._size = 8 + self._head + end

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Append data to a tensor."""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        if name != self._last and self._written[name] + len(content) > self._end[name]:
            raise ValueError(f"{name} was said to be of {self._kinds[name]}")
        self._file.seek(8 + self._head + self._written[name])
        self._file.write(content)
        self._written[name] += len(content)

    def __enter__(self) -> StreamedTensors:
        self._file = self._path.open("wb")
        try:
            self._file.truncate(self._size)
        except OSError:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                for name in self._kinds:
                    if self._written[name] != self._end[name]:
                        raise ValueError(
                            f"{name} was said to be of {self._kinds[name]}, it was not written whole"
                        )
                header = self._header(self._written.get(self._last, 0))
                self._file.seek(0)
                self._file.write(self._head.to_bytes(8, "little") + header.ljust(self._head))
        finally:
            self._file.close()

    def _header(self, end: int) -> bytes:
        content: dict[str, Any] = {"__metadata__": self._metadata}
        for name, (kind, shape) in self._kinds.items():
            places = [self._begin[name], self._end[name]]
            content[name] = {"dtype": kind, "shape": shape, "data_offsets": places}
        if self._last:
            begin = self._begin[self._last]
            content[self._last] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        encoded = json.dumps(content, separators=(",", ":")).encode()
        return encoded + b" " * (-len(encoded) % 8)


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file atomically. Raises OSError."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for line in lines:
            file.write(line)


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a failure keeps an older file of that name.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        write_lines(path, [content])
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}). Choose another folder, or free some space; then run it again."
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager with a temporary path whose file is flushed to disk and replaces `path` at the end of the block.

    On failure the temporary file is removed and an older file is kept. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync). Raises OSError."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(
        path, os.O_RDONLY if path.is_dir() else os.O_RDWR
    )  # Windows can only flush files opened for writing
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of a file's bytes.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return sha256_of(path)[:16]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); name another file.") from error


def state_digest(state: Mapping[str, Tensor], progress: Callable[[float], None] | None = None) -> str:
    """Return the first 16 hex digits of a SHA-256 over names, shapes and fp32 values, independent of the file format."""
    digest = hashlib.sha256()
    total, done = max(sum(tensor.numel() for tensor in state.values()), 1), 0
    for key in sorted(state):
        digest.update(f"{key}{tuple(state[key].shape)}".encode())
        digest.update(state[key].detach().cpu().float().contiguous().numpy().data)
        done += state[key].numel()
        if progress is not None:
            progress(done / total)
    return digest.hexdigest()[:16]


def key_problems(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Describe wrong names and shapes in a state dict; empty if it is complete.

    `num_batches_tracked` of batch norms has no effect in eval mode, so it may be missing.
    """
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in expected]
    reshaped = [
        f"{key} is {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    named = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return "; ".join(f"{len(keys)} {kind} ({some(keys)})" for kind, keys in named if keys)


def some(names: Iterable[object], count: int = 3) -> str:
    """List the first `count` names."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:count]) + (", …" if len(listed) > count else "")
