"""Configurations of training runs: read strictly, refused by name, written back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from idadapter_core.config import config_toml, existing, parse_config, writable
from idadapter_core.errors import ConfigError
from idadapter_core.training.config import RunConfig, differences, read_config, read_record
from idadapter_core.training.provenance import config_digest


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, "")) == RunConfig()


def test_values_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[train]\nlearning_rate = 1e-4\nbetas = [0.8, 0.99]\n[output]\nprompts = ["a man", "a woman"]\n[adapter.settings]\ntokens = 16\n',
    )
    config = read_config(
        path, ["train.steps=20", "base.family = sdxl", 'output.folder="runs/a=b"', "data.flip=false"]
    )
    assert config.train.learning_rate == 1e-4
    assert config.train.betas == (0.8, 0.99)
    assert config.output.prompts == ("a man", "a woman")
    assert config.adapter.settings == {"tokens": 16}
    assert (config.train.steps, config.base.family, config.output.folder) == (20, "sdxl", "runs/a=b")
    assert config.data.flip is False


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, "[train]\nlearning_rate = 1\n"))
    assert config.train.learning_rate == 1.0
    assert type(config.train.learning_rate) is float


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "train.learning_rate=1e-7",
            "adapter.settings.tokens=64",
            'output.prompts=["x \\" y", "ü"]',
            "base.path='C:\\x'",
        ],
    ],
)
def test_what_is_written_reads_back_as_it_was(tmp_path: Path, overrides: list[str]) -> None:
    config = read_config(write(tmp_path, ""), overrides)
    assert read_config(write(tmp_path, config_toml(config))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nxyz = 1", r"unknown setting train\.xyz; known are .*learning_rate"),
        ("[train]\nstep = 1", r"unknown setting train\.step; did you mean steps\?"),
        ("[trian]\nseed = 1", r"unknown setting trian; did you mean train\?"),
        ("train = 3", r"train is a section, write it as \[train\], got 3"),
        ("[train]\nsteps = 1.5", r"train\.steps must be a whole number, got 1\.5"),
        ("[train]\nsteps = true", r"train\.steps must be a whole number, got True"),
        ("[data]\nflip = 1", r"data\.flip must be true or false, got 1"),
        ("[base]\npath = 3", r"base\.path must be a text, got 3"),
        ("[train]\nbetas = [0.9]", r"train\.betas must have 2 entries"),
        ("[output]\nprompts = 'x'", r"output\.prompts must be a list"),
        ("[base]\nfamily = 'sd3'", r"base\.family must be one of sd15, sd21, sdxl, got 'sd3'"),
        ("[train]\nlearning_rate = 0", r"train\.learning_rate must be above 0"),
        ("[train]\nlearning_rate = nan", r"train\.learning_rate must be above 0"),
        ("[train]\nema_decay = 1.5", r"train\.ema_decay must be between 0 and 1"),
        ("[train]\nmax_grad_norm = inf", r"train\.max_grad_norm must be a finite number"),
        ("[train]\ndrop_identity = 0.7\ndrop_text = 0.7", "must not add up to more than 1"),
        ("[data]\nresolution = 500", r"data\.resolution must be a multiple of 8"),
        (
            "[adapter]\nsettings = { token = 3 }",
            r"adapter\.settings\.token is no setting of idadapter; did you mean tokens\?",
        ),
        ("[data]\nprompt = 'a <clas word>'", r"data\.prompt: .*<clas word>.*did you mean <class word>\?"),
        ("[output]\nprompts = ['<caption>']", r"output\.prompts: nothing is known to stand for <caption>"),
        ("[output]\nprompts = ['x', 3]", r"output\.prompts must be a text, got 3"),
        ("[train]\nbetas = [0.9, 0.9, 0.9]", r"train\.betas must have 2 entries, got \[0\.9, 0\.9, 0\.9\]"),
        ("[adapter]\nsettings = 3", r"adapter\.settings must be a table, got 3"),
        ("[base]\npath = 2026-01-02", r"base\.path must be a text, got datetime\.date"),
        ("[data.flip]\nx = 1", r"data\.flip must be true or false, got \{'x': 1\}"),
        (
            "[train]\nseed = 'x'\nstep = 1\n[data]\nflip = 1",
            r"data\.flip must be true or false, got 1 \(2 more: train\.seed, train\.step\)",
        ),
        ("[train", r"no valid TOML"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_config(write(tmp_path, text))
    assert f"{raised.value}".startswith(f"{tmp_path / 'run.toml'}: ")
    with pytest.raises(ConfigError, match=r"run\.toml(:| and --set: )"):  # which may be what is wrong
        read_config(tmp_path / "run.toml", ["train.seed=1"])


@pytest.mark.parametrize("override", ["lr", "lr=1", "=1", "train.=1", "train.learning_rate"])
def test_overrides_that_name_nothing(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set takes section\.key=value"):
        read_config(write(tmp_path, ""), [override])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path / "absent.toml")


def test_any_dataclass_can_be_read() -> None:
    assert parse_config(RunConfig, {"train": {"seed": 3}}).train.seed == 3


SHIPPED = sorted(path for path in (Path(__file__).resolve().parents[3] / "configs").glob("*.toml"))


@pytest.mark.parametrize(
    "path", [p for p in SHIPPED if p.name.startswith("demo_world_")], ids=lambda p: p.stem
)
def test_configurations_of_the_demo_world_are_read(path: Path) -> None:
    """Their networks are small, so their settings are their own."""
    config = read_config(path)
    assert (config.base.family, config.data.resolution) == ("sd15", 128)
    assert config.output.folder == f"demo_world/runs/{path.stem.removeprefix('demo_world_')}"
    if config.adapter.method == "uniid":
        assert path.stem.endswith("identity" if config.loss.identity else config.adapter.branch)


OTHERS = ("eval_", "demo_world_")


@pytest.mark.parametrize("path", [p for p in SHIPPED if not p.name.startswith(OTHERS)], ids=lambda p: p.stem)
def test_shipped_configurations_are_those_of_the_methods(path: Path) -> None:
    config = read_config(path)
    assert path.stem.startswith(config.adapter.method)
    assert config.base.family in path.stem
    assert config.train.global_batch_size % config.train.gradient_accumulation_steps == 0
    if config.adapter.method == "uniid":
        published = {"adapter": 1e-5, "text": 1e-4}[config.adapter.branch]
        assert (config.train.learning_rate, config.train.weight_decay, config.loss.identity) == (
            published,
            0.01,
            0.0,
        )
        assert (config.train.drop_identity, config.train.drop_text, config.train.drop_both) == (0.1, 0.0, 0.0)
    else:
        assert (config.train.learning_rate, config.loss.identity, config.data.references) == (3e-5, 0.1, 4)


def test_a_branch_of_ones_own_keeps_its_settings(tmp_path: Path) -> None:
    """What the file says goes before what the method is published with."""
    text = '[adapter]\nmethod = "uniid"\nbranch = "text"\n[train]\nlearning_rate = 2e-4\n[loss]\nidentity = 0.05\n'
    config = read_config(write(tmp_path, text), ["train.drop_identity=0.2"])
    assert (config.train.learning_rate, config.loss.identity, config.train.drop_identity) == (2e-4, 0.05, 0.2)
    assert config.train.weight_decay == 0.01


def test_the_users_folder(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, '[data]\nindex = "~/faces/index.parquet"\n'))
    assert config.data.index == str(Path.home() / "faces" / "index.parquet")
    with pytest.raises(ConfigError, match=r"output\.prompts: .* has bytes that are no UTF-8"):
        parse_config(RunConfig, {"output": {"prompts": ["x", "\udce9"]}})


@pytest.mark.parametrize("betas", ["[0.9, 1.0]", "[-0.1, 0.9]"])
def test_betas_that_no_average_has(tmp_path: Path, betas: str) -> None:
    with pytest.raises(ConfigError, match="train.betas must be at least 0 and below 1"):
        read_config(write(tmp_path, f"[train]\nbetas = {betas}\n"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train.batch=2", "train.global_batch_size"),
        ("train.accumulate=2", "train.gradient_accumulation_steps"),
        ("train.lr=1e-4", "train.learning_rate"),
        ("train.schedule=cosine", "train.lr_scheduler"),
        ("train.warmup=2", "train.lr_warmup_steps"),
        ("train.clip=1.0", "train.max_grad_norm"),
        ("train.ema=0.9", "train.ema_decay"),
        ("train.precision=bf16", "train.mixed_precision"),
        ("train.checkpointing=true", "train.gradient_checkpointing"),
        ("base.prediction=epsilon", "base.prediction_type"),
        ("loss.min_snr=5.0", "loss.snr_gamma"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    """In a file and in --set; a record of a run that was written before is read as it was meant."""
    section, _, line = old.partition(".")
    name, _, value = line.partition("=")
    text = value if value[0].isdigit() or value == "true" else f'"{value}"'
    message = rf"{section}\.{name} is called {new} now$"
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, f"[{section}]\n{name} = {text}\n"))
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, '[adapter]\nmethod = "uniid"\n'), [old])
    before = read_record(write(tmp_path, f"[{section}]\n{name} = {text}\n"))
    assert before == read_config(write(tmp_path, ""), [f"{new}={value}"]) != RunConfig()


def test_prompts_may_leave_known_things_open(tmp_path: Path) -> None:
    text = '[data]\nprompt = "a photo of a <class word>, <caption>"\n[output]\nprompts = ["a <class word>", "1 < 2"]\n'
    assert read_config(write(tmp_path, text)).data.prompt.endswith("<caption>")


def test_what_differs_is_named(tmp_path: Path) -> None:
    before = read_config(write(tmp_path, "[adapter.settings]\ntokens = 4\n"))
    now = read_config(write(tmp_path, ""), ["train.learning_rate=1e-4", 'output.prompts=["x"]'])
    assert differences(before, before) == []
    assert differences(before, now) == [
        "adapter.settings was {tokens = 4} and is {}",
        "train.learning_rate was 3e-05 and is 0.0001",
        'output.prompts was ["a photo of a <class word>", "a painting of a <class word> in a garden"] and is ["x"]',
    ]


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        (["base.path=x", "base.vae=y", "data.index=z", "data.workers=9", "adapter.start=w"], True),
        (
            [
                "train.gradient_accumulation_steps=2",
                "train.gradient_checkpointing=true",
                "train.steps=3",
                "output.folder=v",
            ],
            True,
        ),
        (["train.learning_rate=1"], False),
        (["base.family=sdxl"], False),
        (["adapter.settings.tokens=4"], False),
        (["train.lr_scheduler=cosine"], False),
    ],
)
def test_a_resumed_run_may_change_settings_that_no_step_depends_on(
    tmp_path: Path, changes: list[str], is_same: bool
) -> None:
    path = write(tmp_path, "")
    assert (config_digest(read_config(path)) == config_digest(read_config(path, changes))) == is_same
    ends = [["train.lr_scheduler=cosine", f"train.steps={steps}"] for steps in (3, 4)]
    assert (
        len({config_digest(read_config(path, end)) for end in ends}) == 2
    )  # a cosine ends where the run does


def test_paths_are_checked_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert existing("base.vae", "here") == Path("here")
    with pytest.raises(
        ConfigError, match=f"base.vae: gone is not there .that is {tmp_path / 'gone'}.; correct"
    ):
        existing("base.vae", "gone")
    assert writable("output.folder", "runs/new") == Path("runs/new")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    with pytest.raises(ConfigError, match="output.folder: .*here is a file; name a folder"):
        writable("output.folder", "here/run")
    (tmp_path / "disk").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="output.folder: .*disk leads nowhere"):
        writable("output.folder", "disk/run")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that nobody can write to")
def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match="output.folder: /proc/run cannot be written"):
        writable("output.folder", "/proc/run")


ACCENTED = '[base]\npath = "modèles/été"\n'


@pytest.mark.parametrize(
    "content",
    [
        *(ACCENTED.encode(name) for name in ("utf-8", "utf-8-sig", "utf-16", "utf-32")),
        *(b"\xfe\xff" + ACCENTED.encode("utf-16-be"), ACCENTED.replace("\n", "\r\n").encode("utf-16")),
        *(ACCENTED.encode(f"utf-{bits}-{order}") for bits in (16, 32) for order in ("le", "be")),  # no mark
    ],
)
def test_every_encoding_of_unicode_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    assert read_config(tmp_path / "run.toml").base.path == "modèles/été"


@pytest.mark.parametrize(
    ("path", "encoding", "name"),
    [
        ("été/base", "cp1252", "Windows-1252, in which it reads 'été'"),
        ("модели/База", "cp1251", "Windows-1251, in which it reads 'модели'"),
        ("モデル", "cp932", "Shift JIS .*'モデル'"),
        ("模型/基础模型", "gb18030", "GB18030.*'模型'"),
        ("모델", "cp949", "EUC-KR.*'모델'"),
        ("μοντέλο", "cp1253", "Windows-1253.*'μοντέλο'"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, path: str, encoding: str, name: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(f'[base]\nfamily = "sd15"\npath = "{path}"\n'.encode(encoding))
    with pytest.raises(
        ConfigError, match=f"line 3 is not UTF-8 .*it seems to be {name}.*Save the file as UTF-8"
    ):
        read_config(file)
    file.write_bytes("[base]\n".encode("utf-16")[:-1])
    with pytest.raises(ConfigError, match="begins as UTF-16, but breaks off .* save it once more, as UTF-8"):
        read_config(file)


@pytest.mark.parametrize(
    ("letter", "encoding"),
    [("я", "cp1251"), ("Я", "cp1251"), ("ё", "cp1251"), ("é", "cp1252"), ("Ünal", "cp1252"), ("モ", "cp932")],
)
def test_one_letter_tells_no_encoding(tmp_path: Path, letter: str, encoding: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(f'[base]\nfamily = "sd15"\npath = "{letter}"\n'.encode(encoding))
    with pytest.raises(ConfigError, match=r"line 3 is not UTF-8 .*Save the file as UTF-8") as raised:
        read_config(file)
    assert "seems to be" not in f"{raised.value}"


@pytest.mark.parametrize("line", [r'path = "C:\\models', r'path = "C:\\models\\base'])
def test_backslashes_that_are_right_get_no_advice(tmp_path: Path, line: str) -> None:
    """What is wrong there is the quote that is missing."""
    with pytest.raises(ConfigError, match="Correct that line: path = ") as raised:
        read_config(write(tmp_path, f'[base]\n{line}\nfamily = "sd15"\n'))
    assert "single quotes" not in f"{raised.value}"


@pytest.mark.parametrize("path", [r"C:\models\base", r"C:\Users\me", "D:\\", r"models\xl"])
def test_backslashes_in_double_quotes(tmp_path: Path, path: str) -> None:
    """A right line in the eyes of who wrote it: the hint says what to write."""
    hint = r"single quotes, 'C:\\models\\base', or with /"
    with pytest.raises(ConfigError, match=f"line 2.*{hint}"):
        read_config(write(tmp_path, f'[base]\npath = "{path}"\nfamily = "sd15"\n'))
    with pytest.raises(ConfigError, match=hint):
        read_config(write(tmp_path, ""), [f'base.path="{path}"'])
    assert read_config(write(tmp_path, f"[base]\npath = '{path}'\n")).base.path == path
    assert read_config(write(tmp_path, ""), [f"base.path={path}"]).base.path == path


def test_backslashes_that_are_escapes(tmp_path: Path) -> None:
    r"""TOML reads "C:\new\train" without complaint: as a path with a line break and a tab."""
    config = read_config(write(tmp_path, r"[base]" + "\n" + r'path = "C:\new\train"'))
    for check in (existing, writable):
        with pytest.raises(ConfigError, match=r"base.path: 'C:\\new\\train' has a control .*single quotes"):
            check("base.path", config.base.path)


def test_what_is_no_text_and_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"output.folder: .* has bytes that are no UTF-8"):
        read_config(
            write(tmp_path, ""), ["output.folder=runs/\udce9"]
        )  # as Python reads byte E9 of a command
    with pytest.raises(ConfigError, match=r"line 2.*Correct that line: seed = 1 2"):
        read_config(write(tmp_path, "[train]\nseed = 1 2\n"))
    with pytest.raises(ConfigError, match="train.mixed_precision: fp16 is not offered.*bf16"):
        read_config(write(tmp_path, ""), ["train.mixed_precision=fp16"])


@pytest.mark.parametrize(
    "settings",
    [
        ["loss.denoise_to=[300, 800]"],  # it reaches beyond where denoising begins
        ["loss.denoise_to=[300, 200]"],
        ["loss.denoise_from=[900, 1000]"],
        ["loss.denoise_to=[-1, 200]"],
    ],
)
def test_bounds_of_denoising_are_in_order(tmp_path: Path, settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"ascending timesteps of 0..999.*they are \["):
        read_config(write(tmp_path, ""), settings)
    found = read_config(write(tmp_path, ""), ["loss.denoise_to=[0, 750]", "loss.denoise_steps=3"]).loss
    assert (found.denoise_steps, found.denoise_to, found.denoise_from) == (3, (0, 750), (750, 900))
