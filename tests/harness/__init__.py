"""Test harness for the real ComfyUI: in this process, as a server, and in a browser."""
