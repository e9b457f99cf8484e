"""The papers' ablations and their published values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ..config import nearest
from ..errors import ConfigError
from .config import EvaluationConfig, PresetConfig, RunEntry

Figures = Mapping[str, float]  # by metric name


@dataclass(frozen=True)
class Preset:
    """An ablation."""

    title: str
    source: str
    adapters: Mapping[str, str]  # the files it can use, with descriptions; the first is required
    runs: Callable[[Mapping[str, str], PresetConfig], tuple[RunEntry, ...]]
    published: Mapping[str, Figures] = field(default_factory=dict)  # by run name


def with_preset(config: EvaluationConfig) -> EvaluationConfig:
    """Add the runs of the preset before the configuration's own.

    Raises:
        ConfigError: an unknown preset, or its adapters are missing or have other names.
    """
    settings = config.preset
    if not settings.name:
        return config
    if settings.name not in PRESETS:
        raise ConfigError(f"there is no preset {settings.name}{nearest(settings.name, PRESETS)}")
    preset = PRESETS[settings.name]
    known = "; ".join(f"{name}: {what}" for name, what in preset.adapters.items())
    needed = next(iter(preset.adapters))
    for name, path in settings.adapters.items():
        if name not in preset.adapters or not isinstance(path, str):
            raise ConfigError(
                f"preset.adapters.{name} = {path!r} is no file of {settings.name}, which takes {known}"
            )
    if needed not in settings.adapters:
        raise ConfigError(
            f"preset.adapters.{needed} is missing; {settings.name} takes the paths of these files: {known}"
        )
    return replace(config, runs=(*preset.runs(settings.adapters, settings), *config.runs))


def _table2(paths: Mapping[str, str], settings: PresetConfig) -> tuple[RunEntry, ...]:
    runs = [
        RunEntry(name, paths[key], scales=settings.scales, references=references)
        for name, key, references in (
            ("no text embedding", "no_text", 4),
            ("no MFF", "no_mff", 4),
        )
        if key in paths
    ]
    for count in range(1, 6):
        path = paths.get(f"n{count}", paths["full"])
        runs.append(RunEntry(f"N={count}", path, scales=settings.scales, references=count))
    if "no_id_loss" in paths:
        runs.append(RunEntry("no ID loss (N=4)", paths["no_id_loss"], scales=settings.scales, references=4))
    return tuple(runs)


def _uniid(paths: Mapping[str, str], settings: PresetConfig) -> tuple[RunEntry, ...]:
    def run(name: str, parts: str, rescale: bool = False) -> RunEntry:
        return RunEntry(
            name,
            paths["adapter"],
            text_branch=paths.get("text_branch", ""),
            scales=settings.scales,
            parts=parts,
            rescale=rescale,
        )

    return (
        run("text branch only", "text"),
        run("adapter branch only", "adapter"),
        run("both, naive", "both"),
        run("both, rescaled", "both", rescale=True),
    )


def _figures(identity: float, expression: float, pitch: float, yaw: float) -> Figures:
    return {"id_sim": identity, "expr_div": expression, "pose_div_pitch": pitch, "pose_div_yaw": yaw}


PRESETS: Mapping[str, Preset] = {
    "idadapter-table2": Preset(
        title="IDAdapter, Table 2: what each part does, and the number N of references",
        source="arXiv 2403.13535, Table 2 (SD 2.1, another test set and other judging models: compare directions, not values)",
        adapters={
            "full": "the whole method, trained with N = 4",
            "no_text": "trained without the identity word",
            "no_mff": "trained without mixing the facial features",
            "no_id_loss": "trained without the identity loss",
            **{f"n{count}": f"trained with N = {count}; else full is given {count}" for count in range(1, 6)},
        },
        runs=_table2,
        published={
            "no text embedding": _figures(0.394, 0.49, 6.08, 13.49),
            "no MFF": _figures(0.517, 0.46, 5.31, 13.26),
            "N=1": _figures(0.602, 0.37, 5.02, 12.90),
            "N=2": _figures(0.601, 0.58, 6.97, 15.39),
            "N=3": _figures(0.604, 0.61, 7.03, 15.44),
            "N=4": _figures(0.603, 0.65, 7.90, 16.47),
            "N=5": _figures(0.601, 0.64, 7.88, 16.42),
            "no ID loss (N=4)": _figures(0.592, 0.57, 7.64, 16.38),
        },
    ),
    "uniid-ablation": Preset(
        title="UniID: each branch alone, both as trained, both with normalized rescaling",
        source="arXiv 2512.03964",
        adapters={
            "adapter": "the adapter branch, or a file of both branches",
            "text_branch": "the text branch, where it is a file of its own",
        },
        runs=_uniid,
    ),
}
