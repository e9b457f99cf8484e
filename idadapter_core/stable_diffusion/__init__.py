"""Stable Diffusion outside ComfyUI: base models, the networks beside them, adapters inside the UNet, pictures."""
