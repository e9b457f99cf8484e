"""Stable Diffusion outside ComfyUI: base models, face and vision networks, adapter injection, and image generation."""
