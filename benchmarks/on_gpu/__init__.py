"""Measurements on one GPU: all that the documentation says of GPUs, in one command of at most 8 minutes.

`parts` lists the measurements, `processes` runs each of them in a process of its own, `table` writes docs/benchmarks.md.
"""
