"""Peak of this process's resident memory during a block. Linux only."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType

_SELF = Path("/proc/self")
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _SELF.exists() else None  # glibc's


class PeakMemory:
    """Context manager: after the block, `bytes` is the peak minus the resident memory at its start."""

    bytes = 0

    @staticmethod
    def is_known() -> bool:
        """Whether this system reports the peak."""
        return (_SELF / "clear_refs").exists()

    def __enter__(self) -> PeakMemory:
        if _trim is not None:
            _trim(0)  # otherwise memory that was freed before and is used again would not count
        (_SELF / "clear_refs").write_text("5", encoding="ascii")  # reset the peak
        self._before = _field("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bytes = _field("VmHWM") - self._before


def _field(name: str) -> int:
    lines = (_SELF / "status").read_text(encoding="utf-8").splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(value)
