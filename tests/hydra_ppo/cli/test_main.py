"""The command line: exit codes, one-line errors, dry run, inspect; nothing here loads a model."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hydra_ppo.cli import commands, example_row
from hydra_ppo.cli import main as cli
from hydra_ppo.cli.dry_run import Quantity, ppo_arithmetic, sft_arithmetic
from hydra_ppo.cli.flags import parse
from hydra_ppo.cli.model_files import check_model
from hydra_ppo.config.settings import DataSettings, ModelSettings, PPOConfig, RolloutSettings, RunSettings, SFTConfig
from hydra_ppo.data.sources import open_source
from hydra_ppo.errors import ConfigError, DataError, NonFiniteError, RewardError, UnsupportedModelError
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.quickstart import run as quickstart
from hydra_ppo.runs.run import Run
from tests.training import tokenizer, write_model

HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "accelerate")


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base of 3 MiB in `model`, and in `trained` what reward training on it leaves."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "model", intermediate_size=1960)
    model = HydraModel.from_pretrained(folder / "model", train="sft")
    model.reward_head_trained = True
    model.save_pretrained(folder / "trained")
    tokenizer().save_pretrained(folder / "trained")
    return folder


@pytest.fixture
def inputs(tmp_path, models) -> list[str]:
    """Flags that name a trained model and 100 preference rows."""
    for name in ("model", "trained"):
        shutil.copytree(models / name, tmp_path / name)
    rows = [{"prompt": f"question {i}: ", "chosen": "yes", "rejected": "no"} for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return ["--model.name_or_path", "trained", "--data.train", "pairs.jsonl", "--run.output", "out"]


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


COMMANDS = (
    "sft, ppo, rlhf, export, push, quantize, score, generate, features, heads, label-next, self-label, reward-eval, doctor, "
    "launch, report, compare, inspect, completion, init, plan, profile, quickstart, serve"
)

BAD_COMMAND_LINES = [
    ([], f"no command given; choose one of {COMMANDS}, or --help."),
    (["pppo"], "pppo is not a command; did you mean ppo?"),
    (["zzz"], f"zzz is not a command; choose one of {COMMANDS}."),
    (["ppo", "nofile.yaml"], "nofile.yaml does not exist; name a YAML file of settings, or give the settings as flags."),
    (["sft", "--model.quantisation", "nf4"], "model.quantisation is not a setting; did you mean model.quantization?"),
    (["export", "run"], "the following arguments are required: --output; hydra-ppo export --help shows the usage."),
    (["export", "run", "--output", "x"], "run is not a folder; name a run folder of ppo or sft."),
    (["export", "run", "--outptu", "x"], "--outptu is not an option; did you mean --output?"),
    (["score", "run"], "the following arguments are required: DATA; hydra-ppo score --help shows the usage."),
    (["score", "run", "pairs.jsonl"], "run is not a folder; name a run folder of ppo or sft."),
    (["generate", "run", "--prompt", "x", "--sample", "2"], "--sample is not an option; did you mean --samples?"),
    (
        ["quickstart", "--seed", "-1"],
        "argument --seed: '-1' is not a whole number of 0 or more; hydra-ppo quickstart --help shows the usage.",
    ),
    (["quickstart", "--over"], "--over is not an option; did you mean --overwrite?"),
    (["inspect"], "the following arguments are required: RUN; hydra-ppo inspect --help shows the usage."),
    (["inspect", "nowhere"], "nowhere is not a folder; name a run folder."),
    (
        ["inspect", "."],
        ". holds no state.json, so it is not a run; name a folder that sft, ppo or quickstart wrote.",
    ),
]


@pytest.mark.parametrize(
    ("argv", "message"), BAD_COMMAND_LINES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_exit_2(argv, message, capsys):
    assert call(capsys, *argv) == (2, "", message + "\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a=1 is wrong;\n  set a=2."), 2, "a=1 is wrong; set a=2."),
        (DataError("no rows"), 2, "no rows"),
        (UnsupportedModelError("no linear layers"), 2, "no linear layers"),
        (NonFiniteError("loss is nan"), 1, "loss is nan"),
        (RewardError("two numbers"), 1, "two numbers"),
        (RuntimeError("out of memory\nat step 3"), 1, "RuntimeError: out of memory at step 3 (--traceback shows where)"),
        (KeyError("x"), 1, "KeyError: 'x' (--traceback shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error, code, line, capsys, inputs, monkeypatch):
    def fail(config, resume):
        raise error

    monkeypatch.setattr(commands, "ppo", fail)
    assert call(capsys, "ppo", *inputs) == (code, "", line + "\n")
    assert call(capsys, "ppo", *inputs, "--traceback")[2].startswith("Traceback")
    monkeypatch.setenv("HYDRA_TRACEBACK", "1")
    assert call(capsys, "ppo", *inputs)[2].startswith("Traceback")


def test_commands_get_what_was_parsed(capsys, inputs, monkeypatch, tmp_path):
    seen = []
    for module, name in ((commands, "sft"), (commands, "ppo"), (commands, "export"), (quickstart, "main")):
        monkeypatch.setattr(
            module, name, lambda *arguments, name=name, **options: seen.append((name, *arguments, *options.items()))
        )
    assert call(capsys, "sft", *inputs, "--epochs", "3")[0] == 0
    assert call(capsys, "ppo", *inputs, "--rollout.batch_size", "32", "--resume")[0] == 0
    assert call(capsys, "export", "model", "--output", "plain", "--adapter-only")[0] == 0
    assert call(capsys, "export", "model", "--output", "plain", "--role", "reward", "--dtype", "bf16")[0] == 0
    assert call(capsys, "quickstart")[0] == 0
    assert call(capsys, "quickstart", "--output", "q", "--seed", "3", "--overwrite")[0] == 0
    assert (seen[0][1].epochs, seen[1][1].rollout.batch_size) == (3, 32)
    assert (seen[0][2:], seen[1][2:]) == ((("resume", False),), (("resume", True),))
    assert seen[2:] == [
        ("export", Path("model"), Path("plain"), "actor", True, "auto"),
        ("export", Path("model"), Path("plain"), "reward", False, "bf16"),
        ("main", Path("runs/quickstart"), 0, False),
        ("main", Path("q"), 3, True),
    ]


def run_and_list_imports(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a fresh interpreter, which writes the heavy packages it has imported to stderr."""
    script = "import sys; from hydra_ppo.cli.main import main; code = main(sys.argv[1:]); "
    script += f"sys.stderr.write(repr([m for m in {HEAVY!r} if m in sys.modules])); sys.exit(code)"
    return subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "argv", [["--help"], ["sft", "--help"], ["generate", "-h"], ["ppo", "-h"], ["ppo", "--print-config"], ["--version"]]
)
def test_help_imports_nothing_heavy(argv):
    done = run_and_list_imports(argv)
    assert (done.returncode, done.stderr) == (0, "[]")
    assert done.stdout


def test_module_runs_as_a_program_and_survives_a_closed_pipe():
    done = subprocess.run([sys.executable, "-m", "hydra_ppo.cli", "zzz"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    # A pipe whose reading end is closed is what `| head` leaves behind.
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "hydra_ppo.cli", "ppo", "--print-config"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["sft", "ppo", "export", "score", "generate", "quickstart", "inspect"])
def test_every_command_has_help(command, capsys):
    try:
        code = cli.main([command, "--help"])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 0
    assert f"hydra-ppo {command}" in capsys.readouterr().out


# Dry run


def test_ppo_arithmetic_by_hand():
    config = PPOConfig(
        ModelSettings("m"),
        DataSettings("d", max_prompt_tokens=100),
        RunSettings("o"),
        rollout=RolloutSettings(batch_size=64, generation_batch_size=24, max_new_tokens=28),
        steps=10,
        ppo_epochs=2,
        minibatch_size=16,
        microbatch_size=6,
    )
    # 64 prompts, decoded 24 + 24 + 16; 64 / 16 = 4 minibatches x 2 epochs = 8 optimizer steps,
    # each in 6 + 6 + 4 = 3 micro-batches; 64 x 28 tokens sampled; 64 x (100 + 28) x 2 epochs in updates.
    assert ppo_arithmetic(config, prompts=128) == [
        Quantity("PPO steps", 1, 10),
        Quantity("prompts, each with one rollout", 64, 640),
        Quantity("batches decoded", 3, 30),
        Quantity("minibatches = optimizer steps", 8, 80),
        Quantity("micro-batches", 24, 240),
        Quantity("tokens sampled, at most", 1792, 17920),
        Quantity("tokens in updates of each role, at most", 16384, 163840),
        Quantity("passes over the prompts", 0.5, 5.0),
    ]
    fours = replace(config, rollout=replace(config.rollout, samples_per_prompt=4))  # 16 prompts, 160 of 128 in all
    by_name = {q.name: q for q in ppo_arithmetic(fours, prompts=128)}
    assert by_name["prompts, each with 4 rollouts"] == Quantity("prompts, each with 4 rollouts", 16, 160)
    assert by_name["passes over the prompts"] == Quantity("passes over the prompts", 0.125, 1.25)
    # 300 tokens hold 2 full rows of 128: 16 / 2 = 8 micro-batches per minibatch; 100 tokens hold none, so rows go alone.
    by_name = {q.name: q for q in ppo_arithmetic(replace(config, microbatch_tokens=300), None)}
    assert by_name["micro-batches, at most"].per_step == 64
    assert by_name["passes over the prompts"] == Quantity("passes over the prompts", None, None)
    # Two passes over 130 prompts, 64 a step: 260 / 64, rounded up; how many steps an unread dataset gives is not known.
    passes = replace(config, steps=None, epochs=2)
    by_name = {q.name: q for q in ppo_arithmetic(passes, 130)}
    assert (by_name["PPO steps"].total, by_name["tokens sampled, at most"].total) == (5, 5 * 1792)
    assert by_name["passes over the prompts"].total == pytest.approx(5 * 64 / 130)
    assert {q.total for q in ppo_arithmetic(passes, None)} == {None}
    by_name = {q.name: q for q in ppo_arithmetic(replace(config, microbatch_tokens=100), None)}
    assert by_name["micro-batches, at most"].per_step == 8 * 16


def test_sft_arithmetic_by_hand():
    config = SFTConfig(
        ModelSettings("m"),
        DataSettings("d", max_prompt_tokens=10, max_response_tokens=6),
        RunSettings("o"),
        batch_size=32,
        microbatch_size=5,
        epochs=2,
    )
    # 95 pairs: batches of 32, 32, 31 twice = 6 steps; micro-batches 7, 7 and 31 / 5 -> 7, twice = 42;
    # 190 pairs are 380 sequences of at most 16 tokens.
    assert sft_arithmetic(config, pairs=95) == [
        Quantity("optimizer steps", 1, 6),
        Quantity("preference pairs", 32, 190),
        Quantity("micro-batches", 7, 42),
        Quantity("sequences (chosen and rejected)", 64, 380),
        Quantity("tokens, at most", 1024, 6080),
    ]
    # Stopped after 4 steps: one epoch (95) and one full batch (32); micro-batches 21 + 7.
    stopped = {q.name: q.total for q in sft_arithmetic(replace(config, max_steps=4), pairs=95)}
    assert (stopped["optimizer steps"], stopped["preference pairs"], stopped["micro-batches"]) == (4, 127, 28)
    unknown = {q.name: q.total for q in sft_arithmetic(config, pairs=None)}
    assert set(unknown.values()) == {None}


@pytest.mark.parametrize("command", ["sft", "ppo"])
def test_dry_run_shows_the_arithmetic_and_leaves_nothing(command, capsys, inputs, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(capsys, command, *inputs, "--dry-run")
    assert (code, err) == (0, "")
    assert "3.0 MiB" in out
    assert "100 rows" in out
    assert "5 of them, 95 to train on" in out
    assert "optimizer steps" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_reads_no_weight(capsys, inputs, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_, **__: pytest.fail("weights were read"))
    assert call(capsys, "ppo", *inputs, "--dry-run")[0] == 0


def test_dry_run_says_what_it_did_not_check(capsys, inputs, monkeypatch):
    monkeypatch.setattr(example_row, "open_source", lambda *_: open_source("pairs.jsonl", "train"))  # as if it were downloaded
    code, out, _ = call(capsys, "sft", *inputs, "--data.train", "org/pairs", "--dry-run")
    assert code == 0
    assert out.count("not checked, would be downloaded") == 1


BAD_DRY_RUNS = [
    (["--model.name_or_path", "./none"], "model.name_or_path='./none' names no such folder; check the path."),
    (["--model.name_or_path", "no such/model"], "model.name_or_path='no such/model' names no such folder; check the path."),
    (
        ["--model.name_or_path", "org/model"],
        "model.name_or_path='org/model' names no such folder, nor a model in the hub's cache, and HF_HUB_OFFLINE forbids to "
        "ask the hub; check the path or the name.",
    ),
    (["--model.name_or_path", "pairs.jsonl"], "model.name_or_path='pairs.jsonl' is a file; name the folder that holds it."),
    (
        ["--model.name_or_path", "empty"],
        "model.name_or_path='empty' holds neither config.json nor hydra.json; name a model folder or a run of sft or ppo.",
    ),
    (
        ["--model.name_or_path", "sharded"],
        "model.name_or_path='sharded' lacks b.safetensors (1 of 2 shards); copy the model again.",
    ),
    (
        ["--model.name_or_path", "pickled"],
        "model.name_or_path='pickled' holds weights as pytorch_model.bin only; save them again as safetensors.",
    ),
    (
        ["--model.name_or_path", "weightless"],
        "model.name_or_path='weightless' holds config.json but no weights; add model.safetensors.",
    ),
    (
        ["--model.name_or_path", "saved"],
        "model.name_or_path='saved' needs its base at '../gone' beside it; put it back there.",
    ),
    (["--data.train", "none.jsonl"], "none.jsonl: no such file; check the path."),
    (["--data.eval", "none.jsonl"], "none.jsonl: no such file; check the path."),
    (
        ["--run.output", "pairs.jsonl/run"],
        "run.output='pairs.jsonl/run' cannot be made, pairs.jsonl is a file; choose another folder.",
    ),
    (["--run.output", "pairs.jsonl"], "run.output='pairs.jsonl' is a file; choose a folder."),
    (["--run.output", "model"], "run.output='model' is not empty and holds no run; choose another folder."),
    (
        ["--reward.sources", "[{kind: function, target: 'no_such.f:g'}]"],
        "reward.sources[0].target='no_such.f:g' names no installed package 'no_such'; correct the module's name.",
    ),
    (
        ["--reward.sources", "[{kind: classifier, target: ./none}]"],
        "reward.sources[0].target='./none' names no such folder; check the path.",
    ),
]


@pytest.mark.parametrize(
    ("argv", "message"), BAD_DRY_RUNS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_dry_run_finds_what_would_stop_the_run(argv, message, capsys, inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("sharded", "pickled", "weightless", "saved"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "sharded/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}})
    )
    (tmp_path / "sharded/a.safetensors").write_bytes(b"")
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"")
    (tmp_path / "saved/hydra.json").write_text(manifest({"name_or_path": "../gone", "relative": True}))
    assert call(capsys, "ppo", *inputs, *argv, "--dry-run") == (2, "", message + "\n")


def manifest(base: dict) -> str:
    lists = {"roles": {}, "adapters": [], "heads": []}
    return json.dumps({"base": base, **lists, "reward_head_trained": False, "trunk_layers": 0})


def test_saved_models_are_followed_to_their_base(inputs, tmp_path):
    for name, base in (
        ("near", {"name_or_path": "../model", "relative": True}),
        ("far", {"name_or_path": "org/m", "relative": False}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hydra.json").write_text(manifest(base))
    assert check_model("m", "near") == "saved by this program; base: local folder, 3.0 MiB of weights"
    assert check_model("m", "far").startswith("saved by this program; base org/m: not a local folder")
    (tmp_path / "near/hydra.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"hydra\.json is not a manifest of this program"):
        check_model("m", "near")


# Inspect


RUNNING: list[Run] = []
"""A run that nobody holds any more gives back its lock, as a dead process does."""


def make_run(tmp_path: Path, state: str) -> Path:
    config = parse(
        PPOConfig, "ppo", ["--model.name_or_path", "m", "--data.train", "d", "--run.output", str(tmp_path / "r")]
    ).config
    run = Run.create(config.run, config, "ppo")
    run.log(1, {"objective/kl": 0.5, "eval/scores": 2.0, "memory/rollout_peak_bytes": 2**20})
    run.log(2, {"objective/kl": 0.25, "policy/loss": None})
    for name in ("step-2", "step-10", ".writing-step-11"):  # the last one was cut short
        checkpoint = run.folder / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.bin").write_bytes(bytes(3 * 2**20))
    if state == "finished":
        run.finish({"steps": 2})
    elif state == "failed":
        run.__exit__(ValueError, ValueError("broken"), None)
    elif state == "killed":
        content = json.loads((run.folder / "state.json").read_text())
        # A process that has the number of the dead one must not pass for it.
        (run.folder / "state.json").write_text(json.dumps(content | {"pid": os.getppid()}))
    else:
        RUNNING.append(run)
    return run.folder


@pytest.mark.parametrize(
    ("made", "shown", "error"),
    [
        ("running", "running", None),
        ("finished", "finished", None),
        ("failed", "failed", "ValueError: broken"),
        ("killed", "interrupted", "process"),
    ],
)
def test_inspect_json(made, shown, error, capsys, tmp_path):
    folder = make_run(tmp_path, made)
    code, out, err = call(capsys, "inspect", str(folder), "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["command"], report["state"], report["last_step"]) == ("ppo", shown, 2)
    assert report["error"] is None if error is None else error in report["error"]
    assert report["metrics"]["objective/kl"] == {"value": 0.25, "step": 2}
    assert report["metrics"]["eval/scores"] == {"value": 2.0, "step": 1}
    assert report["metrics"]["policy/loss"] == {"value": None, "step": 2}
    assert report["metrics"]["memory/score_peak_bytes"] == {"value": None, "step": None}
    assert report["checkpoints"] == [{"name": "step-2", "bytes": 3 * 2**20}, {"name": "step-10", "bytes": 3 * 2**20}]
    assert report["config"]["model.quantization"] is None
    assert report["config"]["rollout.batch_size"] == 64


def test_inspect_table_shows_dashes_for_what_was_not_measured(capsys, tmp_path):
    folder = make_run(tmp_path, "finished")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "objective')  # a crash in mid-write
    code, out, _ = call(capsys, "inspect", str(folder))
    assert code == 0
    rows = {
        cells[0].strip(): [c.strip() for c in cells[1:-1]] for line in out.splitlines() if len(cells := line[1:].split("│")) > 2
    }
    assert rows["memory/score_peak (MiB)"] == ["-", "-"]
    assert rows["memory/rollout_peak (MiB)"] == ["1.0", "1"]
    assert rows["objective/kl"] == ["0.25", "2"]
    assert rows["step-10"] == ["3.0"]


def test_inspect_of_a_broken_run(capsys, tmp_path):
    (tmp_path / "state.json").write_text("{")
    code, _, err = call(capsys, "inspect", ".")
    assert (code, err.count("\n")) == (2, 1)
    assert "broken state.json" in err
