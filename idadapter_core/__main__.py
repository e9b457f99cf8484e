"""`python -m idadapter_core`: which programs there are."""

import sys

PROGRAMS = """\
python -m idadapter_core.data      from photos to an index: scan, stats, dedupe, shards
python -m idadapter_core.cache     latents and features of a run's photos, computed once
python -m idadapter_core.train     train an adapter
python -m idadapter_core.export    the file for Load ID Adapter, from a run
python -m idadapter_core.evaluate  measure adapters: likeness, prompts, variety
python -m idadapter_core.convert   say what a checkpoint is; convert it; write an untrained IDAdapter
python -m idadapter_core.demo_world  pictures of people who do not exist

Each explains itself with --help; docs/training.md goes through them, docs/demo_world.md through the last.
"""

if __name__ == "__main__":
    sys.stdout.write(PROGRAMS)
