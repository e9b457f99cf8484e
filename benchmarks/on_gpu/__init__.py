"""Benchmarks on one GPU: all GPU measurements of the documentation, in one command of at most 8 minutes.

`parts` lists the measurements, `processes` runs each in a separate process, `table` writes docs/benchmarks.md.
"""
