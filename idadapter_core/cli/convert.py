"""`python -m idadapter_core convert`: describes a checkpoint, and writes it in the project's own format; or writes an untrained IDAdapter,
from which a training starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter, initial_adapter, load_adapter, save_adapter
from ..files import DTYPES
from ..methods import METHODS, method_of
from ..methods.method import UNCONDITIONAL
from ..recognizer import recorded_recognizer
from .program import Parser, require_new, run

MAX_SEED = 2**64 - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    output = _check(parser, options)
    return run(lambda: _convert(options, output))


def _convert(options: argparse.Namespace, output: Path | None) -> int:
    if options.init is None:
        adapter = load_adapter(options.files[0], options.text_branch)
        if recognizer := recorded_recognizer(options.recognizer, adapter.kind.needs(adapter.config).stages):
            adapter = replace(adapter, config=replace(adapter.config, recognizer=recognizer))
    else:
        preset = _presets()[options.init]
        stages = method_of(preset).needs(preset).stages
        recognizer = recorded_recognizer(options.recognizer, stages)
        config = replace(preset, recognizer=recognizer, **_new_settings(options))
        dtype = DTYPES[options.dtype] or torch.float32
        adapter = initial_adapter(config, options.files[0].name, options.seed or 0, dtype)
    sys.stdout.write(f"{adapter.info}\n{_counts(adapter)}digest {adapter.digest}\n")
    if output is not None:
        save_adapter(adapter, output, DTYPES[options.dtype])
        sys.stdout.write(f"wrote {output} ({output.stat().st_size:,} bytes)\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m idadapter_core convert",
        usage="%(prog)s [options] INPUT [OUTPUT]\n       %(prog)s [options] --init PRESET OUTPUT",
        description="Describe an adapter checkpoint; with an output file, write it as .safetensors with its config inside. "
        "With --init, write an untrained IDAdapter instead, from which a training starts.",
    )
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="INPUT: a checkpoint file or a published folder; OUTPUT: the .safetensors file to write. With --init, only OUTPUT",
    )
    parser.add_argument("--text-branch", type=Path, help="a second checkpoint, whose text branch is added")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="keep",
        help="precision of the written weights (default: that of the input, with the encoder in fp32; with --init fp32)",
    )
    parser.add_argument(
        "--recognizer",
        type=Path,
        help="file of the face recogniser that the adapter was (or will be) trained with. Its digest is recorded, and other recognisers "
        "are refused from then on. For an IDAdapter, an .onnx file is the recogniser of a face package (w600k_r50.onnx of buffalo_l)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    new = parser.add_argument_group("a new adapter")
    new.add_argument("--init", choices=_presets(), help="UNet family of the adapter")
    new.add_argument(
        "--references", type=int, help="reference photos of a person in training, N (default: 4)"
    )
    new.add_argument(
        "--tokens",
        type=int,
        help="number of identity tokens after a learned resampling; 0: keep all tokens (default: 0)",
    )
    new.add_argument(
        "--unconditional",
        choices=UNCONDITIONAL,
        help="on negative prompts: skip the adapter, or use the tokens of zeroed features (default: skip)",
    )
    new.add_argument("--seed", type=int, help="seed of the random weights (default: 0)")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path | None:
    """The output file, if one is to be written. Exits with a message if options contradict each other."""
    files: list[Path] = options.files
    if options.init is None:
        for name in ("references", "tokens", "unconditional", "seed"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} is for a new adapter; add --init PRESET, or leave it out")
        if not files:
            parser.error("name the checkpoint to read, or add --init PRESET to write an untrained IDAdapter")
        if len(files) > 2:
            parser.error(f"an input and an output at most, got {len(files)} files")
        if options.recognizer is not None and len(files) < 2:
            parser.error("--recognizer records a digest in the output file; name one")
    else:
        if not files:
            parser.error("--init writes an untrained adapter; name the .safetensors file to write")
        if len(files) > 1:
            parser.error(f"--init reads no checkpoint; name the output alone, got {len(files)} files")
        if options.text_branch is not None:
            parser.error("--init writes an IDAdapter, which has no second file; leave --text-branch out")
        if options.seed is not None and not 0 <= options.seed <= MAX_SEED:
            parser.error(f"--seed must be between 0 and {MAX_SEED}, got {options.seed}")
    if options.init is None and len(files) < 2:
        return None
    output = files[-1]
    require_new(parser, output, ".safetensors", options.overwrite)
    return output


def _presets() -> dict[str, Any]:
    """Configs of the available untrained adapters, by UNet family."""
    return {family: config for method in METHODS.values() for family, config in method.presets.items()}


def _new_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The preset settings given as options."""
    given = {name: getattr(options, name) for name in ("references", "tokens", "unconditional")}
    return {name: value for name, value in given.items() if value is not None}


def _counts(adapter: Adapter) -> str:
    """A line with the parameters of each part; empty for a method with one part."""
    parts = adapter.kind.parameters(adapter.config).items()
    if not parts:
        return ""
    return f"parameters in M: {', '.join(f'{name} {count / 1e6:.2f}' for name, count in parts if count)}\n"
