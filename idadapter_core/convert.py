"""`python -m idadapter_core.convert`: says what a checkpoint is, and writes it in the project's own format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoint import load_adapter, save_adapter
from .errors import IDAdapterError
from .faces.iresnet import digest, load_iresnet

DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m idadapter_core.convert",
        description="Print what an adapter checkpoint is; with an output file, write it as .safetensors with its config inside.",
    )
    parser.add_argument("input", type=Path, help="a checkpoint file, or a published folder")
    parser.add_argument("output", type=Path, nargs="?", help="the .safetensors file to write")
    parser.add_argument("--text-branch", type=Path, help="a second checkpoint whose text branch is added")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="precision of the written weights")
    parser.add_argument(
        "--recognizer",
        type=Path,
        help="the face network's file that the adapter was trained with: it is recorded, and any other is refused from then on",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    options = parser.parse_args(arguments)
    if options.recognizer is not None and options.output is None:
        parser.error("--recognizer records a digest in the output file; name one")
    if options.output is not None:
        if options.output.suffix != ".safetensors":
            parser.error(f"the output must end in .safetensors, got {options.output.name}")
        if options.output.exists() and not options.overwrite:
            parser.error(f"{options.output} exists; choose another name or add --overwrite")
    try:
        adapter = load_adapter(options.input, options.text_branch)
        if options.recognizer is not None:
            recorded = digest(load_iresnet(options.recognizer))
            adapter = replace(adapter, config=replace(adapter.config, recognizer=recorded))
        sys.stdout.write(f"{adapter.info}\ndigest {adapter.digest}\n")
        if options.output is not None:
            save_adapter(adapter, options.output, DTYPES[options.dtype])
            sys.stdout.write(f"wrote {options.output} ({options.output.stat().st_size:,} bytes)\n")
    except IDAdapterError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
