"""`python -m idadapter_core COMMAND`, also under torchrun and accelerate launch."""

from .cli import main
from .cli.program import start

if __name__ == "__main__":
    start(main)
