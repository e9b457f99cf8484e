"""Evaluation of identity preservation, prompt following and variety. Needs the `train` extra."""
