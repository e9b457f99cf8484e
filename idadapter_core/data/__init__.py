"""Data for training: from photos as people keep them to one index in which every photo has a status and a reason.

`python -m idadapter_core scan|stats|dedupe|shards|show|convert` is how it is used; `index.read_index` is what the trainer reads.
"""
