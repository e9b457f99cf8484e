"""Evaluation: how much a person is kept, how well prompts are followed, how varied pictures are. Needs the `train` extra."""
