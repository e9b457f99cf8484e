"""What the tests need to meet the real ComfyUI: in this process, as a server, and in a browser."""
