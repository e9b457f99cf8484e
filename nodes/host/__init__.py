"""Integration with ComfyUI. Only the nodes and this package import `comfy` and `folder_paths`."""
