"""Training: what runs when somebody makes weights of their own. Needs the `train` extra of the package."""
