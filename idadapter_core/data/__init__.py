"""Data preparation: turn folders, tables and shards of photos into an index in which every photo has a status and a reason.

Run it with `python -m idadapter_core scan|stats|dedupe|shards|show|convert`; the trainer reads the index with `index.read_index`.
"""
