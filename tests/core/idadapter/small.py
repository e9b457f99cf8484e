"""A small IDAdapter in both choices of what E_r keeps."""

from __future__ import annotations

from dataclasses import replace

from tests.tiny.idadapter import CONFIGS

SMALL = CONFIGS["sd15"]
N = SMALL.references
RESAMPLED = replace(SMALL, tokens=6)
KEPT = {"all": SMALL, "resampled": RESAMPLED}
