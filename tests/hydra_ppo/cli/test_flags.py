"""Settings from YAML and flags: what loads, what wins, and one exact line for everything that is wrong."""

import dataclasses
from pathlib import Path

import pytest

from hydra_ppo.cli.flags import format_help, load_config, parse, print_config
from hydra_ppo.config.reading import build, describe, flatten, groups_of, nest, settings_of
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.config.writing import render_yaml
from hydra_ppo.errors import ConfigError

REQUIRED = ["--model.name_or_path", "m", "--data.train", "d.jsonl", "--run.output", "out"]
CONFIGS = pytest.mark.parametrize(("config_class", "command"), [(SFTConfig, "sft"), (PPOConfig, "ppo")])


def parse_ppo(*argv: str) -> PPOConfig:
    config = parse(PPOConfig, "ppo", argv).config
    assert config is not None
    return config


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_sets_flags_win_and_defaults_fill(tmp_path):
    path = write(
        tmp_path,
        "model: {name_or_path: base, lora: {r: 4}}\n"
        "data.train: d.jsonl\n"  # a dotted key says the same as a nested one
        "run: {output: out, trackers: [tensorboard]}\n"
        "rollout:\n"  # an empty group stays at its defaults
        "kl: {coef: 1e-3}\n"  # YAML 1.1 reads 1e-3 as a string
        "steps: 7\n",
    )
    config = parse_ppo(
        "--steps", "9", path, "--model.lora.r=8", "--run.trackers+", "wandb", "--run.overwrite", "--run.progress", "no"
    )
    assert (config.steps, config.model.lora.r, config.model.lora.alpha, config.kl.coef) == (9, 8, 32, 1e-3)
    assert config.run.trackers == ["tensorboard", "wandb"]
    assert config.run.overwrite is True
    assert isinstance(parse_ppo(*REQUIRED, "--gamma", "1").gamma, float)
    assert config.run.progress is False
    assert config.rollout.batch_size == 64
    assert config.optimizer.learning_rate == 5e-5  # PPO's own default, not OptimizerSettings'


def test_lists_and_reward_sources_by_flag():
    config = parse_ppo(
        *REQUIRED, "--model.lora.target_modules", "[q_proj,v_proj]", "--reward.sources+", "{kind: function, target: 'a:b'}"
    )
    assert config.model.lora.target_modules == ["q_proj", "v_proj"]
    assert [source.kind for source in config.reward.sources] == ["head", "function"]
    assert config.reward.sources[1].target == "a:b"


def test_settings_that_are_mappings(tmp_path):
    text = (
        "data:\n"
        "  train: d\n"
        "  columns: {prompt: question, chosen: completions.text}\n"
        "  chat_template_kwargs: {enable_thinking: false, date: 2026-01-02, mood: 'no', deep: {list: [1, 2.5, null]}}\n"
    )
    kwargs = {"enable_thinking": False, "date": "2026-01-02", "mood": "no", "deep": {"list": [1, 2.5, None]}}
    request = parse(SFTConfig, "sft", [write(tmp_path, text), *REQUIRED])
    assert request.config.data.columns == {"prompt": "question", "chosen": "completions.text"}
    assert request.config.data.chat_template_kwargs == kwargs  # a quoted no is text, and so is a date
    printed = print_config(SFTConfig, request)
    assert "  columns: {prompt: question, chosen: completions.text}\n" in printed
    assert load_config(SFTConfig, write(tmp_path, printed)) == request.config
    flags = ["--data.columns", "{chosen: best}", '--data.chat_template_kwargs={"mood": "no"}']
    data = parse(SFTConfig, "sft", [write(tmp_path, text), *REQUIRED, *flags]).config.data
    assert (data.columns, data.chat_template_kwargs) == ({"chosen": "best"}, {"mood": "no"})  # a flag replaces the file's
    assert parse(SFTConfig, "sft", [write(tmp_path, text), *REQUIRED, "--data.columns", "{}"]).config.data.columns == {}


def test_bare_boolean_flag_before_the_yaml_file(tmp_path):
    path = write(tmp_path, "steps: 3\n")
    config = parse_ppo("--run.overwrite", path, *REQUIRED)
    assert config.run.overwrite
    assert config.steps == 3


@CONFIGS
def test_print_config_loads_back(config_class, command, tmp_path):
    request = parse(config_class, command, [*REQUIRED, "--optimizer.eps", "1e-12", "--run.project", "null", "--print-config"])
    path = write(tmp_path, print_config(config_class, request))
    assert load_config(config_class, path) == request.config
    plain = write(tmp_path, render_yaml(config_class, request.values, comments=False))
    assert "#" not in Path(plain).read_text()
    assert load_config(config_class, plain) == request.config


@CONFIGS
def test_print_config_without_required_settings_is_a_template(config_class, command, tmp_path):
    text = print_config(config_class, parse(config_class, command, ["--print-config"]))
    assert text.count("# name_or_path: ???") == text.count("# train: ???") == text.count("# output: ???") == 1
    for setting in settings_of(config_class).values():
        assert setting.help.split()[0] in text
    path = write(tmp_path, text)
    assert parse(config_class, command, [path, *REQUIRED]).config == parse(config_class, command, REQUIRED).config


@CONFIGS
def test_every_setting_round_trips_and_has_help(config_class, command, tmp_path):
    text = " ".join(format_help(config_class, command).split())
    for name, setting in settings_of(config_class).items():
        assert setting.help, name
        assert f"--{name} " in text
        assert setting.help.split(";")[0].split(".")[0][:30].rsplit(" ", 1)[0] in text, name
        if not setting.required:
            assert describe(setting.hint) not in ("", str(setting.hint)), name
    assert set(groups_of(config_class)) >= {"model", "model.lora", "data", "run", "optimizer"}
    flat = flatten(parse(config_class, command, REQUIRED).values, config_class)
    assert set(flat) == set(settings_of(config_class))
    assert build(config_class, nest(flat)) == parse(config_class, command, REQUIRED).config


BAD_FLAGS = [
    (["--model.quantisation", "nf4"], "model.quantisation is not a setting; did you mean model.quantization?"),
    (["--learning_rate", "1"], "learning_rate is not a setting; did you mean optimizer.learning_rate?"),
    (["--kl_coef", "1"], "kl_coef is not a setting; did you mean kl.coef?"),
    (["--batch-size", "1"], "batch-size is not a setting; did you mean rollout.batch_size?"),
    (["--model.r", "1"], "model.r is not a setting; did you mean model.lora.r?"),
    (["--zzz", "1"], "zzz is not a setting; --help lists all settings."),
    (["--rollout", "x"], "rollout is a group of settings, not a setting; set its members, for example rollout.batch_size."),
    (
        ["--data.columns.prompt", "q"],
        "data.columns.prompt is not a setting, data.columns is; write data.columns as {prompt: ...}.",
    ),
    (
        ["--data.columns", "prompt=q"],
        "data.columns='prompt=q' is not a mapping of names to strings; write for example {name: value}.",
    ),
    (
        ["--data.chat_template_kwargs", "{1: a}"],
        "data.chat_template_kwargs={1: 'a'} has the key 1, which is no name; put it in quotes.",
    ),
    (["--dryrun"], "--dryrun is not an option; did you mean --dry-run?"),
    (["-x"], "-x is not an option; write settings in full, for example --run.seed 1."),
    (["--steps"], "--steps has no value; give an integer or null."),
    (["--optimizer.learning_rate", "abc"], "optimizer.learning_rate='abc' is not a float; write a number, for example 5e-05."),
    (["--steps", "1.5"], "steps='1.5' is not an integer or null; write a whole number, for example 1."),
    (["--run.progress", "maybe"], "run.progress='maybe' is not true or false; write true or false."),
    (["--model.quantization", "nf5"], "model.quantization='nf5' is not one of int8, nf4, fp4 or null; did you mean nf4?"),
    (
        ["--run.memory", "sometimes"],
        "run.memory='sometimes' is not one of auto, always or never; choose one, for example auto.",
    ),
    (
        ["--run.trackers", "wandb"],
        "run.trackers='wandb' is not a list of tensorboard and wandb; write for example [tensorboard].",
    ),
    (["--model.lora.r", "0"], "model.lora.r=0 must be greater than 0; set r to a positive number."),
    (["--reward.sources", "[{knd: 1}]"], "reward.sources[0].knd is not a setting; did you mean reward.sources[0].kind?"),
    (
        ["--reward.sources", "[{kind: head}, {weight: a}]"],
        "reward.sources[1].weight='a' is not a float; write a number, for example 0.1.",
    ),
    (
        ["--reward.sources", "[{kind: function}]"],
        "reward.sources[0].kind='function' needs a target; give package.module:function or a model folder.",
    ),
    (
        ["--minibatch_size", "7"],
        "rollout.batch_size=64 is not divisible by minibatch_size=7; choose a minibatch_size that divides 64.",
    ),
    (["--reward.sources+", "{weight: null}"], "reward.sources[1].weight=null is not a float; leave it out to get the default."),
    (["a.yaml", "b.yaml"], "'b.yaml' is one argument too many; give one YAML file, then --SETTING VALUE flags."),
    (["none.yaml"], "none.yaml does not exist; name a YAML file of settings, or give the settings as flags."),
]


@pytest.mark.parametrize(("argv", "message"), BAD_FLAGS, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_flags_give_one_exact_line(argv, message):
    with pytest.raises(ConfigError) as error:
        parse(PPOConfig, "ppo", [*argv, *REQUIRED])
    assert str(error.value) == message


BAD_YAML = [
    ("", "{path} is empty; write settings in it, or leave it out and give them as flags."),
    ("# steps: 3\n", "{path} is empty; write settings in it, or leave it out and give them as flags."),
    ("steps: 3\nkl: [1\ngamma: 2\n", "{path}, line 3: expected ',' or ']', but got ':'; correct the YAML there."),
    ("\tsteps: 3\n", "{path}, line 1: found character '\\t' that cannot start any token; correct the YAML there."),
    ("steps: 3\nsteps: 4\n", "{path}, line 2: steps is given twice; correct the YAML there."),
    ("- steps\n", "{path} holds a list, not 'name: value' settings; --print-config writes an example."),
    ("steps\n", "{path} holds a line of text, not 'name: value' settings; --print-config writes an example."),
    ("model: gpt2\n", "model='gpt2' is not a group of settings; indent its members below it, for example name_or_path."),
    ("model: {name_or_path: 3}\n", "model.name_or_path=3 is not a string; put it in quotes."),
    ("ppo_epochs: null\n", "ppo_epochs=null is not an integer; leave it out to get the default."),
    ("optimizer: {learning_rat: 1}\n", "optimizer.learning_rat is not a setting; did you mean optimizer.learning_rate?"),
    ("model.lora.q: 1\n", "model.lora.q is not a setting; did you mean model.lora.r?"),
    ("steps: 3.0\n", "steps=3.0 is not an integer or null; write a whole number, for example 1."),
    ("optimizer: {learning_rate: .inf}\n", "optimizer.learning_rate=inf is not a finite number; write a finite one."),
    ("steps: yes\n", "steps=True is not an integer or null; write a whole number, for example 1."),
    (
        "kl: {estimator: no}\n",
        "kl.estimator=False is not one of none, k1, k3, js, js_unbiased or squared; put the word in quotes.",
    ),
    ("rollout: {top_p: 2}\n", "rollout.top_p=2.0 must lie in (0, 1]; choose for example 0.95."),
    (
        "reward: {sources: {kind: head}}\n",
        "reward.sources={{'kind': 'head'}} is not a list of {{kind, target, weight, name, label, dtype, quantization, "
        "max_tokens, batch_size, timeout, retries, aggregate, aggregate_coef}}; write for example [{{kind: head}}].",
    ),
    (
        "reward: {sources: [{weight: null}]}\n",
        "reward.sources[0].weight=null is not a float; leave it out to get the default.",
    ),
    ("1: 2\n", "1 is not a setting; --help lists all settings."),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML)
@pytest.mark.parametrize("option", [[], ["--print-config"], ["--dry-run"]])
def test_bad_yaml_gives_one_exact_line(text, message, option, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        parse(PPOConfig, "ppo", [path, *REQUIRED, *option])
    assert str(error.value) == message.format(path=path)


def test_yaml_that_is_no_text_or_a_folder(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("run: {project: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        parse_ppo(str(tmp_path / "latin.yaml"), *REQUIRED)
    with pytest.raises(ConfigError, match="is a folder, not a YAML file"):
        parse_ppo(str(tmp_path), *REQUIRED)


def test_missing_required_settings_are_named(tmp_path):
    path = write(tmp_path, "data: {train: null}\n")  # null counts as missing
    assert parse_ppo(path, *REQUIRED).data.train == "d.jsonl"
    with pytest.raises(ConfigError) as error:
        parse_ppo(path, "--run.output", "out")
    assert str(error.value) == (
        "model.name_or_path and data.train have no value; "
        "set them in the YAML file or by flag, for example --model.name_or_path VALUE."
    )


def test_other_command_knows_its_own_names():
    with pytest.raises(ConfigError, match=r"^steps is not a setting; did you mean max_steps\?$"):
        parse(SFTConfig, "sft", [*REQUIRED, "--steps", "3"])


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_ppo(*REQUIRED).steps = 3
