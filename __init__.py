"""ComfyUI-IDAdapter: pictures that are the person in the photos and do what the prompt says.

Importing this loads neither insightface nor onnxruntime and downloads nothing; the nodes load even where the two are missing,
and say what to install when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import IDAdapterExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> IDAdapterExtension:
    """ComfyUI asks here for the pack's nodes (V3)."""
    from .nodes import IDAdapterExtension

    return IDAdapterExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
