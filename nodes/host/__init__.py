"""All that knows ComfyUI. The nodes and this folder are the only importers of `comfy` and `folder_paths`."""
