"""Placeholders of prompts, filled in for each person or photo."""

from __future__ import annotations

import re

from .config import nearest
from .errors import ConfigError

CLASS_WORD, CAPTION = "<class word>", "<caption>"
_OPEN = re.compile(r"<[A-Za-z][^<>]*>")


def require_known(name: str, prompt: str, known: tuple[str, ...]) -> None:
    """Reject a prompt with an unknown placeholder."""
    for found in _OPEN.findall(prompt):
        if found not in known:
            raise ConfigError(
                f"{name}: nothing is known to stand for {found} in {prompt!r}{nearest(found, known)}"
            )
