"""Display names of the nodes that messages mention."""

from __future__ import annotations

APPLY = "Apply ID Adapter"
ATTACH = "Attach Identity to Conditioning"
FACE_IDENTITY = "Face Identity"
LOAD_ADAPTER = "Load ID Adapter"
MIX = "Mix Face Features"
PROMPT = "ID Prompt"
RESCALE = "Normalized Identity Rescaling"
