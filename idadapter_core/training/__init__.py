"""Training of adapters. Needs the `train` extra of the package."""
