"""Builds the networks of the demo world from scratch, stage by stage: `python -m idadapter_core demo-world build`.

See docs/demo_world.md.
"""
