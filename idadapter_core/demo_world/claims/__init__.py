"""Measures what the methods claim, in the demo world: whom the pictures show, and what of the prompt."""
