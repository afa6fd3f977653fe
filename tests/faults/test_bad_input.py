"""Bad input: one line that says what to do, exit code 2, nothing written, and no weight read where that can be known before.

Every case that prepares something works in its own copy of a small project: a base, pairs, a model that joint SFT wrote,
and a finished PPO run.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from hydra_ppo.cli import commands
from hydra_ppo.cli.main import main
from hydra_ppo.model import loading
from hydra_ppo.runs import folder as run_folder
from tests.faults.project import make_project, merge, ppo_settings, sft_settings
from tests.training import llama, tokenizer


@dataclass
class Place:
    """Where a case happens: its folder, what it patches, and what is to be undone after it."""

    folder: Path
    patch: pytest.MonkeyPatch
    after: ExitStack

    def path(self, name: str) -> Path:
        return self.folder / name


Prepare = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        argv: the command line, in the folder of the case.
        says: what the line must contain: the setting or file, the rule, the remedy.
        prepare: what is wrong, done to the copy of the project.
        weights: never, where the command must not even begin to load a model; opened, where a model is asked for but no weight
            is read; read, where only the model in memory tells.
    """

    argv: list[str]
    says: tuple[str, ...]
    prepare: tuple[Prepare, ...] = ()
    weights: Literal["never", "opened", "read"] = "never"


# What can be done to a project


def put(name: str, content: str | bytes) -> Prepare:
    """Write a file."""

    def prepare(place: Place) -> None:
        place.path(name).parent.mkdir(parents=True, exist_ok=True)
        place.path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def put_rows(name: str, *rows: Any) -> Prepare:
    return put(name, "".join(json.dumps(row) + "\n" for row in rows))


def put_parquet(name: str, columns: dict[str, list[Any]]) -> Prepare:
    return lambda place: pyarrow.parquet.write_table(pyarrow.table(columns), place.path(name))


def remove(*names: str) -> Prepare:
    def prepare(place: Place) -> None:
        for name in names:
            path = place.path(name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def cut(name: str, keep: float = 0.5) -> Prepare:
    """Leave only the first part of a file, as a copy that broke off does."""

    def prepare(place: Place) -> None:
        content = place.path(name).read_bytes()
        place.path(name).write_bytes(content[: int(len(content) * keep)])

    return prepare


def edit(name: str, change: Callable[[Any], object]) -> Prepare:
    """Change what a JSON file holds."""

    def prepare(place: Place) -> None:
        content = json.loads(place.path(name).read_text())
        change(content)
        place.path(name).write_text(json.dumps(content))

    return prepare


def nudge(name: str) -> Prepare:
    """Alter one number of a safetensors file."""

    def prepare(place: Place) -> None:
        tensors = load_file(place.path(name))
        tensors[min(tensors)].view(-1)[0] += 1
        save_file(tensors, place.path(name), {"format": "pt"})

    return prepare


def flip(pattern: str) -> Prepare:
    """Alter a byte in the middle of every file that matches."""

    def prepare(place: Place) -> None:
        found = list(place.folder.glob(pattern))
        assert found, pattern
        for path in found:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    return prepare


def widen_tokenizer(place: Place) -> None:
    wider = tokenizer()
    wider.add_tokens([f"extra{i}" for i in range(4)])
    wider.save_pretrained(place.path("base"))


def other_tokenizer(place: Place) -> None:
    other = tokenizer()
    other.eos_token = "w5"
    other.save_pretrained(place.path("base"))


def endless_tokenizer(place: Place) -> None:
    other = tokenizer()
    other.eos_token = None
    other.save_pretrained(place.path("base"))


def hold_lock(place: Place) -> None:
    """Hold the run as another process does that writes it."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    held = subprocess.Popen([sys.executable, "-S", "-c", code, place.path("run/.lock")], stdin=pipe, stdout=pipe)
    place.after.callback(held.communicate)
    assert held.stdout is not None
    assert held.stdout.readline() == b"held\n"


def no_trackers(place: Place) -> None:
    place.patch.setattr(run_folder, "TRACKER_PACKAGES", {"tensorboard": "no_such_tracker", "wandb": "no_such_tracker"})


def shard_base(place: Place) -> None:
    """Write the base in shards."""
    AutoModelForCausalLM.from_pretrained(place.path("base")).save_pretrained(place.path("base"), max_shard_size="50KB")
    place.path("base/model.safetensors").unlink(missing_ok=True)


def remove_a_shard(place: Place) -> None:
    max(place.folder.glob("base/model-*.safetensors")).unlink()


def pickle_base(place: Place) -> None:
    import torch

    torch.save(load_file(place.path("base/model.safetensors")), place.path("base/pytorch_model.bin"))
    place.path("base/model.safetensors").unlink()


def classifier(labels: int) -> Prepare:
    def prepare(place: Place) -> None:
        LlamaForSequenceClassification(llama(num_labels=labels)).save_pretrained(place.path("judge"))
        tokenizer().save_pretrained(place.path("judge"))

    return prepare


def settings(file: str = "ppo.yaml", **changes: Any) -> Prepare:
    """Change settings in a YAML file of the project."""

    def prepare(place: Place) -> None:
        changed = merge(yaml.safe_load(place.path(file).read_text()), changes)
        place.path(file).write_text(yaml.safe_dump(changed))

    return prepare


def append(file: str, text: str) -> Prepare:
    def prepare(place: Place) -> None:
        place.path(file).write_text(place.path(file).read_text() + text)

    return prepare


PPO, SFT = ["ppo", "ppo.yaml"], ["sft", "sft.yaml"]
RESUME, RESUME_SFT = ["ppo", "run.yaml", "--resume"], ["sft", "sft-run.yaml", "--resume"]
REQUIRED = ["--model.name_or_path", "base", "--data.train", "pairs.jsonl", "--run.output", "new"]
PAIR = {"prompt": "w1 w2", "chosen": "w3", "rejected": "w4"}
CHAT = [{"role": "user", "content": "w1"}]


def config(argv: Iterable[str], *says: str, yaml: str | bytes | None = None) -> Case:
    """A bad setting: by flag, or in a YAML file of its own."""
    return Case([*argv], says, () if yaml is None else (put("bad.yaml", yaml),))


def in_yaml(text: str | bytes, *says: str) -> Case:
    return config(["ppo", "bad.yaml", *REQUIRED], *says, yaml=text)


CONFIG = {
    # wrong types
    "a word for a float": config([*PPO, "--optimizer.learning_rate", "abc"], "optimizer.learning_rate='abc'", "; write a"),
    "a fraction for an integer": config([*PPO, "--steps", "1.5"], "steps='1.5'", "an integer", "; write a number"),
    "a word for a switch": config([*PPO, "--run.progress", "maybe"], "run.progress='maybe'", "; write true or false"),
    "null": in_yaml("ppo_epochs: null\n", "ppo_epochs=null", "; leave it out"),
    "a number for a name": in_yaml("model: {name_or_path: 3}\n", "model.name_or_path=3", "; put it in quotes"),
    "a list for a number": in_yaml("ppo_epochs: [3]\n", "ppo_epochs=[3]", "an integer", "; write a number"),
    "a mapping for a number": in_yaml("ppo_epochs: {a: 1}\n", "ppo_epochs={'a': 1}", "an integer", "; write a number"),
    "a word for a group": in_yaml("model: gpt2\n", "model='gpt2'", "group", "; indent"),
    "a list for a group": in_yaml("kl: [1]\n", "kl=[1]", "group", "; indent"),
    "a word for a reward source": in_yaml("reward: {sources: [head]}\n", "reward.sources", "'head'", "; write"),
    "a date for a number": in_yaml("ppo_epochs: 2024-01-02\n", "ppo_epochs=", "an integer", "; write a number"),
    "a word for a mapping in a list": config([*PPO, "--reward.sources", "[{weight: a}]"], "reward.sources[0].weight='a'", "; "),
    # out of range
    "not finite": in_yaml("optimizer: {learning_rate: .inf}\n", "optimizer.learning_rate=inf", "; write a finite"),
    "no number": in_yaml("kl: {coef: .nan}\n", "kl.coef=nan", "; write a finite"),
    "beyond a float": config([*PPO, "--kl.coef", "1e999"], "kl.coef=inf", "; write a finite"),
    "no steps": config([*PPO, "--steps", "0"], "steps=0", "greater than 0", "; set steps"),
    "gamma above 1": config([*PPO, "--gamma", "1.5"], "gamma=1.5", "[0, 1]", "; choose"),
    "top_p of 0": config([*PPO, "--rollout.top_p", "0"], "rollout.top_p=0", "(0, 1]", "; choose"),
    "no temperature": config([*PPO, "--rollout.temperature", "0"], "rollout.temperature=0", "greater than 0", "; set"),
    "a negative rate": config([*PPO, "--optimizer.learning_rate=-1"], "optimizer.learning_rate=-1.0", "greater", "; set"),
    "a negative seed": config([*PPO, "--run.seed=-1"], "run.seed=-1", "must not be negative", "; set"),
    "all rows held out": config([*PPO, "--data.eval_fraction", "1"], "data.eval_fraction=1.0", "[0, 1)", "; choose"),
    "rank 0": config([*PPO, "--model.lora.r", "0"], "model.lora.r=0", "greater than 0", "; set"),
    "beta of 1": config([*PPO, "--optimizer.beta1", "1"], "optimizer.beta1=1", "[0, 1)", "; choose"),
    "no reward": config([*PPO, "--reward.sources", "[]"], "reward.sources=[]", "; give at least one"),
    "an empty model name": config([*PPO, "--model.name_or_path", ""], "model.name_or_path=''", "; name a model"),
    "no such device": config([*PPO, "--model.device", "gpu"], "model.device='gpu'", "; use auto, cpu"),
    # unknown names
    "a misspelt setting": config([*PPO, "--model.quantisation", "nf4"], "model.quantisation", "did you mean model.quantiz"),
    "an unknown setting in YAML": in_yaml("kl: {coefficient: 1}\n", "kl.coefficient", "; did you mean kl.coef"),
    "a setting of the other command": config([*SFT, "--steps", "3"], "steps", "did you mean max_steps?"),
    "an unknown choice": config([*PPO, "--model.quantization", "nf5"], "model.quantization='nf5'", "did you mean nf4?"),
    "an unknown key of a source": config([*PPO, "--reward.sources", "[{knd: 1}]"], "reward.sources[0].knd", "did you mean"),
    "a number for a name of a setting": in_yaml("1: 2\n", "1 is not a setting", "; --help"),
    "an unknown tracker": config([*PPO, "--run.trackers", "[mlflow]"], "run.trackers", "mlflow", "; "),
    "an unknown layer": Case(
        [*PPO, "--model.lora.target_modules", "[qq_proj]"], ("lora.target_modules=['qq_proj']", "; choose"), weights="read"
    ),
    # contradictions
    "minibatches that do not divide": config([*PPO, "--minibatch_size", "3"], "minibatch_size=3", "; choose"),
    "samples that do not divide": config([*PPO, "--rollout.samples_per_prompt", "3"], "samples_per_prompt=3", "; choose"),
    "full and quantised": config([*SFT, "--method", "full", "--model.quantization", "nf4"], "method='full'", "nf4", "; use"),
    "both losses off": config([*SFT, "--sft_coef", "0", "--reward_coef", "0"], "sft_coef=0", "reward_coef=0", "; set"),
    "a reward adapter with both losses": config([*SFT, "--adapter", "reward"], "adapter='reward'", "sft_coef=1", "; set"),
    "an adapter of another stage": config([*SFT, "--adapter", "actor"], "adapter='actor'", "; choose 'sft'"),
    "a function without a target": config(
        [*PPO, "--reward.sources", "[{kind: function}]"], "reward.sources[0].kind='function'", "; give package.module"
    ),
    "a target that is no function": config(
        [*PPO, "--reward.sources", "[{kind: function, target: judge.py}]"], "target='judge.py'", "form", "; write it so"
    ),
    "a head with a target": config([*PPO, "--reward.sources", "[{target: 'a:b'}]"], "target='a:b'", "; leave target out"),
    "a trunk as deep as the model": Case(
        [*PPO, "--model.trunk_layers", "2"], ("model.trunk_layers=2", "below the 2", "; choose fewer"), weights="read"
    ),
    "flash-attention on a CPU": Case(
        [*PPO, "--model.attention", "flash_attention_2", "--model.device", "cpu"],
        ("model.attention='flash_attention_2'", "; remove the obstacle"),
        weights="opened",
    ),
    "no required setting": config(
        ["ppo", "--steps", "3"], "model.name_or_path, data.train and run.output have no value; set them"
    ),
    "a reward head never trained": Case(
        [*PPO, "--reward.sources", "[{kind: head}]"], ("reward.sources", "never trained; run hydra-ppo sft"), weights="read"
    ),
    "a reward function of no package": config(
        [*PPO, "--reward.sources", "[{kind: function, target: 'no_such:f'}]"], "no_such", "; correct the module's name"
    ),
    "a reward function that is not there": config(
        [*PPO, "--reward.sources", "[{kind: function, target: 'tests.faults.light:gone'}]"], "light:gone", "; check"
    ),
    "a reward function that is no function": config(
        [*PPO, "--reward.sources", "[{kind: function, target: 'tests.faults.light:LOW'}]"], "not callable; name"
    ),
    "a reward module that does not run": Case(
        [*PPO, "--reward.sources", "[{kind: function, target: 'broken_judge:f'}]"],
        ("broken_judge:f", "; "),
        (put("broken_judge.py", "def f(:\n"), lambda place: place.patch.syspath_prepend(place.folder)),
    ),
    "a classifier that is not there": config(
        [*PPO, "--reward.sources", "[{kind: classifier, target: ./judge}]"], "'./judge' names no such folder; check the path"
    ),
    "a classifier with three labels": Case(
        [*PPO, "--reward.sources", "[{kind: classifier, target: judge}]"],
        ("target='judge'", "3 labels; use a classifier"),
        (classifier(3),),
        weights="read",
    ),
    # YAML that is no settings
    "broken YAML": in_yaml("steps: 3\nkl: [1\ngamma: 2\n", "bad.yaml, line 3", "; correct the YAML there"),
    "a tab in YAML": in_yaml("\tsteps: 3\n", "bad.yaml, line 1", "; correct the YAML there"),
    "a setting given twice": in_yaml("steps: 3\nsteps: 4\n", "bad.yaml, line 2: steps is given twice; correct"),
    "a setting given twice, once with dots": in_yaml("kl.coef: 3\nkl: {coef: 4}\n", "kl.coef", "twice", "; "),
    "an empty file": in_yaml("", "bad.yaml is empty; write settings"),
    "comments only": in_yaml("# steps: 3\n", "bad.yaml is empty; write settings"),
    "a list": in_yaml("- steps\n", "bad.yaml holds a list", "; --print-config writes an example"),
    "a line of text": in_yaml("steps\n", "bad.yaml holds a line of text", "; --print-config"),
    "bytes": in_yaml(b"\x00\x01\x02" * 9, "bad.yaml", "; "),
    "no UTF-8": in_yaml("run: {project: é}".encode("latin-1"), "bad.yaml is not UTF-8 text; name"),
    "two documents": in_yaml("steps: 3\n---\nsteps: 4\n", "bad.yaml", "; correct the YAML there"),
    "a Python object": in_yaml("steps: !!python/object:os.system {}\n", "bad.yaml, line 1", "; correct the YAML there"),
    "an anchor inside itself": in_yaml("kl: &a [*a]\n", "kl", "; "),
    "an anchor as its own group": in_yaml("kl: &a {coef: *a}\n", "kl", "; "),
    "nested without an end": in_yaml("a: " + "[" * 3000, "bad.yaml", "; "),
    "a mapping as a key": in_yaml("? {a: 1}\n: 2\n", "bad.yaml, line 1", "; correct the YAML there"),
    "a date that is none": in_yaml("steps: 2024-13-45\n", "bad.yaml", "; correct"),
    "a number of 5000 digits": in_yaml("steps: " + "9" * 5000 + "\n", "bad.yaml", "; "),
    "a missing file": config(["ppo", "gone.yaml"], "gone.yaml does not exist; name a YAML file"),
    "a folder": config(["ppo", "base"], "base is a folder, not a YAML file; name the file"),
    "a name too long for a file": config(["ppo", "x" * 300], "cannot be read", "; name a readable YAML file"),
}


def data(name: str, *says: str, prepare: Prepare | None = None, argv: Iterable[str] = (), command: list[str] = PPO) -> Case:
    """Bad training data."""
    return Case([*command, "--data.train", name, *argv], says, () if prepare is None else (prepare,))


DATA = {
    "no file": data("gone.jsonl", "gone.jsonl: no such file; check the path"),
    "no held-out file": data("pairs.jsonl", "gone.json: no such file; check", argv=["--data.eval", "gone.json"]),
    "an unknown type": data("rows.txt", "rows.txt: files of type '.txt'", "; use .jsonl", prepare=put("rows.txt", "prompt\n")),
    "no type": data("rows", "rows: files of type ''", "; use .jsonl", prepare=put("rows", "prompt\n")),
    "no UTF-8 in a line": data("a.jsonl", "a.jsonl: line 1 ", "UTF-8; save", prepare=put("a.jsonl", b'{"prompt": "\xff"}\n')),
    "no UTF-8 in a list": data("a.json", "a.json: line 2 ", "UTF-8; save", prepare=put("a.json", b'[\n{"prompt": "\xff"}]')),
    "UTF-16": data("a.jsonl", "a.jsonl", "UTF-8; save", prepare=put("a.jsonl", json.dumps(PAIR).encode("utf-16"))),
    "broken lines": data(
        "a.jsonl",
        "a.jsonl: 2 of 3 rows are malformed",
        "line 2: not valid JSON; fix them",
        prepare=put("a.jsonl", json.dumps(PAIR) + '\n{"prompt"\nnull x\n'),
    ),
    "rows that are numbers": data("a.jsonl", "a.jsonl: 2 of 2", "not an object; fix", prepare=put_rows("a.jsonl", 1, 2)),
    "other columns": data(
        "a.jsonl",
        "the columns are question: say with data.columns which is which",
        prepare=put_rows("a.jsonl", {"question": "w1"}),
    ),
    "prompts where pairs are needed": data(
        "a.jsonl",
        "chosen is missing; the columns are prompt: say with data.columns",
        prepare=put_rows("a.jsonl", {"prompt": "w1"}),
        command=SFT,
    ),
    "an empty file": data("a.jsonl", "a.jsonl: holds no rows; give at least one", prepare=put("a.jsonl", "")),
    "blank lines": data("a.jsonl", "a.jsonl: holds no rows; give at least one", prepare=put("a.jsonl", "\n \n\n")),
    "an empty list": data("a.json", "a.json: holds no rows; give at least one", prepare=put("a.json", "[]")),
    "empty prompts, to be skipped": data(
        "a.jsonl",
        "a.jsonl: none of 2 rows is usable (2 x prompt is empty); fix",
        argv=["--data.skip_bad_rows", "true"],
        prepare=put_rows("a.jsonl", {"prompt": ""}, {"prompt": " "}),
    ),
    "a prompt that is too long": data(
        "pairs.jsonl",
        "data.max_prompt_tokens=2",
        "data.long_prompts=error",
        "; fix",
        argv=["--data.max_prompt_tokens", "2", "--data.long_prompts", "error"],
    ),
    "only prompts that are too long": data(
        "pairs.jsonl",
        "none of 24 rows is usable",
        "data.max_prompt_tokens=1",
        "; fix",
        argv=["--data.max_prompt_tokens", "1", "--data.long_prompts", "drop"],
    ),
    "chat without a template": data(
        "a.jsonl", "line 1 holds chat messages", "; use a chat model's tokenizer", prepare=put_rows("a.jsonl", {"prompt": CHAT})
    ),
    "a message without a role": data(
        "a.jsonl", "without a text role; fix", prepare=put_rows("a.jsonl", {"prompt": [{"content": "w1"}]})
    ),
    "half a character": data("a.jsonl", "not valid Unicode; fix", prepare=put_rows("a.jsonl", {"prompt": "\ud800"})),
    "chosen is rejected": data(
        "a.jsonl",
        "none of 1 rows is usable (1 x chosen equals rejected)",
        prepare=put_rows("a.jsonl", PAIR | {"rejected": "w3"}),
        command=SFT,
    ),
    "chosen and rejected of the same tokens": data(
        "a.jsonl",
        "a.jsonl: none of 1 rows is usable",
        "the same tokens",
        "; fix the rows or change",
        prepare=put_rows("a.jsonl", PAIR | {"chosen": "unknown", "rejected": "strange"}),
        command=SFT,
    ),
    "text against messages": data(
        "a.jsonl",
        "one of chosen and rejected is text",
        "; fix",
        prepare=put_rows("a.jsonl", PAIR | {"rejected": CHAT}),
        command=SFT,
    ),
    "no list": data("a.json", "a.json: does not hold a list; write", prepare=put("a.json", json.dumps(PAIR))),
    "lines named .json": data(
        "a.json", "a.json: is not valid JSON", "; fix it, or name it .jsonl", prepare=put_rows("a.json", PAIR, PAIR)
    ),
    "nested without an end": data("a.json", "a.json: is not valid JSON", "; fix it", prepare=put("a.json", "[" * 100_000)),
    "no Parquet": data("a.parquet", "a.parquet: cannot be read", "; check", prepare=put("a.parquet", b"PAR1garbagePAR1")),
    "an empty Parquet file": data("a.parquet", "a.parquet: cannot be read", "; check", prepare=put("a.parquet", b"")),
    "Parquet of other columns": data(
        "a.parquet",
        "none of the columns prompt, chosen, rejected, messages; the columns are text: say with",
        prepare=put_parquet("a.parquet", {"text": ["w1"]}),
    ),
    "Parquet without rows": data(
        "a.parquet", "a.parquet: holds no rows; give", prepare=put_parquet("a.parquet", {"prompt": pyarrow.array([], "string")})
    ),
    "Parquet of numbers": data(
        "a.parquet", "neither text nor a list of messages; fix", prepare=put_parquet("a.parquet", {"prompt": [1, 2]})
    ),
    "half a Parquet file": Case(
        [*PPO, "--data.train", "a.parquet"],
        ("a.parquet: cannot be read", "; check"),
        (put_parquet("a.parquet", {"prompt": ["w1 w2"] * 99}), cut("a.parquet")),
    ),
    "no such dataset": data("no-such/dataset", "no-such/dataset", "split 'train'", "; check the path or name"),
    "a name that is none": data("a b?", "'a b?'"[1:-1], "no such file; check the path"),
    "a file of no use as a folder": data("pairs.jsonl/x.jsonl", "pairs.jsonl/x.jsonl", "; check"),
    "a name too long for a file": data("x" * 300 + ".jsonl", ".jsonl", "; check"),
    "a broken held-out file": data(
        "pairs.jsonl",
        "a.jsonl: 1 of 1 rows is malformed",
        "; fix it",
        argv=["--data.eval", "a.jsonl"],
        prepare=put("a.jsonl", "{"),
    ),
    "a tokenizer without an end": Case(PPO, ("eos_token=None", "; set eos_token"), (endless_tokenizer,)),
    "chat that its template refuses": Case(
        [*PPO, "--data.train", "a.jsonl"],
        ("the chat template refuses", "; fix it"),
        (
            put_rows("a.jsonl", {"prompt": CHAT}),
            edit("base/tokenizer_config.json", lambda content: content.update(chat_template="{{ raise_exception('no') }}")),
        ),
    ),
}


def resumed(*says: str, prepare: Iterable[Prepare] = (), argv: Iterable[str] = ()) -> Case:
    """A run that cannot go on."""
    return Case([*RESUME, *argv], ("run.output='run'", *says), tuple(prepare))


def model(*says: str, prepare: Iterable[Prepare] = (), name: str = "base", weights: Any = "never") -> Case:
    """A model that cannot be used."""
    return Case([*PPO, "--model.name_or_path", name], says, tuple(prepare), weights)


CHECKPOINTS = {
    # going on
    "another setting": resumed("kl.coef was 0.02, is 0.5", "Put that back", argv=["--kl.coef", "0.5"]),
    "another rate": resumed("optimizer.learning_rate was 0.003", "Put", argv=["--optimizer.learning_rate", "1e-3"]),
    "another seed": resumed("run.seed was 0, is 1", "Put that back", argv=["--run.seed", "1"]),
    "another model": resumed(
        "model model.safetensors changed",
        "Put that back",
        prepare=[lambda place: shutil.copytree(place.path("base"), place.path("other")), nudge("other/model.safetensors")],
        argv=["--model.name_or_path", "other"],
    ),
    "altered weights": resumed("model model.safetensors changed", "Put that back", prepare=[nudge("base/model.safetensors")]),
    "an altered config of the model": resumed(
        "model config.json changed", "Put", prepare=[edit("base/config.json", lambda c: c.update(rms_norm_eps=1e-3))]
    ),
    "an altered tokenizer": resumed("tokenizer changed", "Put that back", prepare=[other_tokenizer]),
    "altered data": resumed("data changed", "Put", prepare=[append("pairs.jsonl", json.dumps(PAIR) + "\n")]),
    "several differences at once": resumed("kl.coef was", "; gamma was", argv=["--kl.coef", "1", "--gamma", "0.5"]),
    "fewer steps than are done": resumed("2 steps are done", "more than the 1 asked for", argv=["--steps", "1"]),
    "other rates from the start": Case(
        ["ppo", "linear.yaml", "--resume", "--steps", "4"],
        ("run.output='linear'", "other learning rates", "optimizer.schedule='linear'", "Put that back"),
    ),
    "a run of the other command": Case(
        [*SFT, "--run.output", "run", "--resume"], ("run.output='run'", "a run of ppo, not of sft; choose")
    ),
    "all checkpoints damaged": resumed(
        "no checkpoint that is whole", "; put the checkpoint back", prepare=[flip("run/checkpoints/*/*.safetensors")]
    ),
    "all manifests damaged": resumed(
        "no checkpoint", "; put the checkpoint back", prepare=[flip("run/checkpoints/*/checkpoint.json")]
    ),
    "a checkpoint with a pickle": resumed(
        "no checkpoint that is whole",
        "; put the checkpoint back",
        prepare=[put("run/checkpoints/step-000001/x.bin", b"x"), put("run/checkpoints/step-000002/x.bin", b"x")],
    ),
    "to go on and to begin anew": Case([*RESUME, "--run.overwrite"], ("--resume with run.overwrite=true", "; leave one out")),
    "an sft run with other pairs": Case(
        RESUME_SFT, ("run.output='sft'", "data changed", "Put that back"), (append("pairs.jsonl", json.dumps(PAIR) + "\n"),)
    ),
    "an sft run with fewer epochs": Case([*RESUME_SFT, "--epochs", "1"], ("run.output='sft'", "more than the", "Put that")),
    # saved models
    "a broken hydra.json": model("hydra.json", "; save the model again", name="sft", prepare=[put("sft/hydra.json", "{")]),
    "a hydra.json that is a list": model("hydra.json", "; save", name="sft", prepare=[put("sft/hydra.json", "[]")]),
    "a hydra.json of bytes": model("hydra.json", "; save", name="sft", prepare=[put("sft/hydra.json", b"\xff\xfe")]),
    "a hydra.json that says too little": model(
        "hydra.json lacks roles", "; save", name="sft", prepare=[edit("sft/hydra.json", lambda content: content.pop("roles"))]
    ),
    "a hydra.json of other types": model(
        "hydra.json", "; save", name="sft", prepare=[edit("sft/hydra.json", lambda content: content.update(base=3, roles=[]))]
    ),
    "a hydra.json with strange roles": model(
        "hydra.json", "; save", name="sft", prepare=[edit("sft/hydra.json", lambda c: c.update(roles={"actor": {"x": 1}}))]
    ),
    "a base that is gone": model("'sft'", "base at '../base'", "; put it back", name="sft", prepare=[remove("base")]),
    "no adapter file": model(
        "sft/adapter_model.safetensors", "; save", name="sft", prepare=[remove("sft/sft/adapter_model.safetensors")]
    ),
    "no adapter config": model("adapter_config.json", "; save", name="sft", prepare=[remove("sft/sft/adapter_config.json")]),
    "a broken adapter config": model(
        "adapter_config.json", "; save", name="sft", prepare=[put("sft/sft/adapter_config.json", "{")]
    ),
    "half an adapter file": model(
        "adapter_model.safetensors", "; save", name="sft", prepare=[cut("sft/sft/adapter_model.safetensors")]
    ),
    "no heads": model("heads.safetensors", "; save", name="sft", prepare=[remove("sft/heads.safetensors")]),
    "half a file of heads": model("heads.safetensors", "; save", name="sft", prepare=[cut("sft/heads.safetensors")]),
    "an adapter of another base": model(
        "'sft'",
        "another base",
        "; put",
        name="sft",
        weights="read",
        prepare=[lambda place: make_project(place.folder, hidden_size=32)],
    ),
    "another trunk than that of the adapters": Case(
        [*PPO, "--model.name_or_path", "sft", "--model.trunk_layers", "1"],
        ("model.trunk_layers=1", "; use 0"),
        weights="read",
    ),
    # bases
    "no such model": model("model.name_or_path='./gone'", "names no such folder; check the path", name="./gone"),
    "no such model on the hub": model(
        "model.name_or_path='no-such/model' names no such folder", "hub's cache", "HF_HUB_OFFLINE", "; ", name="no-such/model"
    ),
    "a model that is a file": model("is a file; name the folder", name="pairs.jsonl"),
    "an empty folder": model(
        "'void'", "neither config.json nor hydra.json; name", name="void", prepare=[lambda place: place.path("void").mkdir()]
    ),
    "no config.json": model("'base' holds neither config.json", "; name", prepare=[remove("base/config.json")]),
    "a broken config.json": model("'base'", "config.json", "; ", prepare=[put("base/config.json", "{")], weights="never"),
    "a config.json of no model": model("'base'", "; ", prepare=[put("base/config.json", '{"a": 1}')], weights="opened"),
    "no weights": model("'base' holds config.json but no weights; add", prepare=[remove("base/model.safetensors")]),
    "pickled weights": model("'base' holds weights as pytorch_model.bin only; save them again", prepare=[pickle_base]),
    "half a file of weights": model("model.safetensors", "; copy the model again", prepare=[cut("base/model.safetensors")]),
    "an empty file of weights": model("model.safetensors", "; copy", prepare=[put("base/model.safetensors", b"")]),
    "weights that are none": model("model.safetensors", "; copy", prepare=[put("base/model.safetensors", b"\xff" * 99)]),
    "weights with a broken header": model(
        "model.safetensors", "; copy", prepare=[put("base/model.safetensors", struct.pack("<Q", 4) + b"nope")]
    ),
    "a missing shard": model("'base' lacks model-", "shards); copy the model again", prepare=[shard_base, remove_a_shard]),
    "a broken index of shards": model(
        "broken model.safetensors.index.json; copy", prepare=[shard_base, put("base/model.safetensors.index.json", "{")]
    ),
    "no tokenizer": model(
        "'base' gives no tokenizer",
        "; put the tokenizer's files",
        prepare=[remove("base/tokenizer.json", "base/tokenizer_config.json")],
    ),
    "a broken tokenizer": model("'base' gives no tokenizer", "; put", prepare=[put("base/tokenizer.json", "{")]),
    "a tokenizer of more tokens than the model": model(
        "embeddings for 32 tokens", "up to 35", "; use the model's own tokenizer", prepare=[widen_tokenizer]
    ),
    "an encoder": model(
        "'base'",
        "; use one of the supported families",
        weights="read",
        prepare=[put("base/config.json", '{"model_type": "t5", "vocab_size": 32}')],
    ),
}


def cli(line: str, *says: str, prepare: Iterable[Prepare] = (), weights: Any = "never") -> Case:
    """A bad command line."""
    return Case(line.split(), says, tuple(prepare), weights)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

CLI = {
    "no command": cli("", "no command given; choose one of"),
    "an unknown command": cli("pppo", "pppo is not a command; did you mean ppo?"),
    "a command like no other": cli("zzz", "zzz is not a command; choose one of"),
    "an option before the command": cli("--resume ppo", "--resume is not a command; choose"),
    "an unknown option": cli("ppo ppo.yaml --resum", "--resum is not an option; did you mean --resume?"),
    "a short option": cli("ppo ppo.yaml -x", "-x is not an option; write settings in full"),
    "two files": cli("ppo ppo.yaml run.yaml", "'run.yaml' is one argument too many; give one"),
    "a flag without a value": cli("ppo ppo.yaml --steps", "--steps has no value; give an integer"),
    "a group as a flag": cli("ppo ppo.yaml --model base", "model is a group of settings", "; set its members"),
    "a flag with a name alone": cli("ppo ppo.yaml --", "; "),
    "a switch with two values": cli("ppo ppo.yaml --run.progress true false", "'false' is one argument too many; give one"),
    "quantize of nothing": cli("quantize gone/away --output out", "model='gone/away'", "; check the path or the name"),
    "quantize of no name": cli("quantize ./gone --output out", "model='./gone' names no such folder"),
    "quantize of a run": cli("quantize run --output out", "model='run' is a run", "quantise its base 'base', or what"),
    "quantize of an adapter": cli("quantize run/actor --output out", "model='run/actor' is an adapter; quantise its base"),
    "quantize of a quantised model": cli(
        "quantize base --output out",
        "model='base' is quantised already (nf4); name it in",
        prepare=[edit("base/config.json", lambda content: content.update(quantization_config=NF4))],
    ),
    "quantize of a pickled model": cli(
        "quantize base --output out", "pytorch_model.bin only; save them again as safetensors", prepare=[pickle_base]
    ),
    "quantize of a GGUF file": cli(
        "quantize m.gguf --output out", "'m.gguf' is GGUF", "; name", prepare=[put("m.gguf", "GGUF")]
    ),
    "quantize of a GGUF folder": cli(
        "quantize base --output out",
        *("model='base' is GGUF", "; name the folder with"),
        prepare=[remove("base/model.safetensors"), put("base/m.gguf", "GGUF")],
    ),
    "quantize of half a model": cli(
        "quantize base --output out", "model='base': model.safetensors has", "copy", prepare=[cut("base/model.safetensors")]
    ),
    "quantize of a file": cli("quantize pairs.jsonl --output out", "model='pairs.jsonl' is a file; name"),
    "quantize without an output": cli("quantize base", "--output", "; hydra-ppo quantize --help"),
    "quantize to a folder in use": cli("quantize base --output run", "output='run' is not empty; choose another"),
    "quantize onto itself": cli("quantize base --output base", "output='base' is not empty; choose another"),
    "quantize to a file": cli("quantize base --output pairs.jsonl", "output='pairs.jsonl' is a file; choose"),
    "quantize to five bits": cli("quantize base --output out --quantization nf5", "'nf5'", "'int8', 'nf4', 'fp4'"),
    "quantize in a strange type": cli("quantize base --output out --dtype int4", "'int4'", "'bf16'"),
    "quantize on a strange device": cli("quantize base --output out --device tpu9x", "'tpu9x'", "; use auto, cpu"),
    "export of nothing": cli("export gone --output out", "gone is not a folder; name a run"),
    "export of no run": cli("export base --output out", "run='base' holds no hydra.json; name"),
    "export without an output": cli("export run", "--output", "; hydra-ppo export --help"),
    "export to a folder in use": cli("export run --output base", "output='base' is not empty; choose another"),
    "export to a file": cli("export run --output pairs.jsonl", "output='pairs.jsonl' is a file; choose"),
    "export to below a file": cli("export run --output pairs.jsonl/x", "output='pairs.jsonl/x'", "; choose"),
    "export of a run whose base is gone": cli("export run --output out", "'run'", "; put it back", prepare=[remove("base")]),
    "export of a run with a broken hydra.json": cli(
        "export run --output out", "hydra.json", "; save the model again", prepare=[put("run/hydra.json", "{")]
    ),
    "export of a run with half an adapter": cli(
        "export run --output out", "adapter_model.safetensors", "; ", prepare=[cut("run/actor/adapter_model.safetensors")]
    ),
    "export of a run without its adapter": cli(
        "export run --output out",
        "actor/adapter_model.safetensors",
        "; ",
        prepare=[remove("run/actor/adapter_model.safetensors")],
    ),
    "export of a run whose base is torn": cli(
        "export run --output out", "model.safetensors", "; copy", prepare=[cut("base/model.safetensors")]
    ),
    "inspect of nothing": cli("inspect gone", "gone is not a folder; name a run folder"),
    "inspect of no run": cli("inspect base", "base holds no state.json", "; name a folder"),
    "inspect of a broken run": cli(
        "inspect run", "run holds a broken state.json", "; name", prepare=[put("run/state.json", "{")]
    ),
    "inspect of broken metrics": cli(
        "inspect run", "metrics.jsonl, line 1: not a JSON object; remove", prepare=[put("run/metrics.jsonl", "[]\n{}\n")]
    ),
    "inspect of two runs": cli("inspect run sft", "sft; hydra-ppo inspect --help"),
    "doctor with an argument": cli("doctor now", "now; hydra-ppo doctor --help"),
    "quickstart with a bad seed": cli("quickstart --seed x", "'x' is not a whole number", "; hydra-ppo quickstart --help"),
    "quickstart into a folder in use": cli("quickstart --output base", "base", "; choose"),
    "quickstart into a file": cli("quickstart --output pairs.jsonl", "pairs.jsonl", "; choose"),
    "quickstart below a file": cli("quickstart --output pairs.jsonl/q", "pairs.jsonl/q", "; choose"),
    "profile of no model": cli("profile --simulate", "model is missing; give --model"),
    "profile of an unknown model": cli("profile --model gpt9 --simulate", "model='gpt9'", "; choose among"),
    "profile of an unknown method": cli("profile --model gpt2 --methods qlora", "methods='qlora'", "; choose among"),
    "profile of a bad number": cli("profile --model gpt2 --rank x", "--rank", "'x'", "; hydra-ppo profile --help"),
    "profile of no prompt": cli("profile --model gpt2 --prompt 0", "prompt=0 must be at least 1; choose"),
    "profile of many trunks": cli("profile --model gpt2 --trunk-layers 0,1", "trunk_layers=0,1", "; give one number"),
    "profile of a trunk too deep": cli(
        "profile --model base --simulate --trunk-layers 9", "trunk_layers=9", "; ", weights="opened"
    ),
    "profile into a file": cli("profile --model base --simulate --output pairs.jsonl", "output='pairs.jsonl'", "; choose"),
    "profile on no such device": cli("profile --model base --device gpu", "device='gpu'", "; use"),
    "profile from no record": cli("profile --from gone.json", "gone.json", "; name a file"),
    "profile from another file": cli("profile --from pairs.jsonl", "pairs.jsonl", "; measure again"),
    "profile from bytes": cli("profile --from a.json", "a.json", "; measure", prepare=[put("a.json", b"\xff")]),
    "profile from half a record": cli("profile --from a.json", "a.json", "; measure", prepare=[put("a.json", '{"format": 1}')]),
    "profile of a config of no model": cli(
        "profile --model a.json --simulate", "model='a.json'", "; name", prepare=[put("a.json", '{"model_type": "no-such"}')]
    ),
    "profile into a folder below a file": cli(
        "profile --model base --simulate --output pairs.jsonl/x", "output='pairs.jsonl/x'", "; choose"
    ),
    "plan without a GPU": cli("plan --model gpt2", "gpu_memory is missing; give --gpu-memory"),
    "plan of no model": cli("plan --gpu-memory 8GiB", "model is missing; give --model"),
    "plan for no size": cli("plan --model gpt2 --gpu-memory big", "gpu_memory='big' is not a size; write it"),
    "plan for no memory": cli("plan --model gpt2 --gpu-memory 0", "gpu_memory='0' is not a size; write it"),
    "plan with a bad margin": cli("plan --model gpt2 --gpu-memory 8GiB --margin x", "margin='x'", "; write it"),
    "plan with a bad count": cli("plan --model gpt2 --gpu-memory 8GiB --count -1", "count=-1", "; choose"),
    "plan over a file": cli("plan --model gpt2 --gpu-memory 8GiB --output ppo.yaml", "output='ppo.yaml' exists; name another"),
    "plan into a file": cli("plan --model gpt2 --gpu-memory 8GiB --output pairs.jsonl/a.yaml", "output=", "; choose"),
    "plan for what is no number": cli("plan --model gpt2 --gpu-memory nan", "gpu_memory='nan' is not a size; write it"),
    # output folders
    "output is a file": cli("ppo ppo.yaml --run.output pairs.jsonl", "run.output='pairs.jsonl' is a file; choose"),
    "output below a file": cli("ppo ppo.yaml --run.output pairs.jsonl/x/y", "cannot be made", "is a file; choose another"),
    "output that is no run": cli("ppo ppo.yaml --run.output base", "run.output='base' is not empty and holds no run; choose"),
    "output that holds a run": cli("ppo ppo.yaml --run.output run", "holds a finished run; choose another", "--resume"),
    "output would delete the model": cli(
        "ppo ppo.yaml --run.output sft --model.name_or_path sft --run.overwrite", "would delete model.name_or_path", "; choose"
    ),
    "output would delete the base of the model": cli(
        "ppo ppo.yaml --run.output full --model.name_or_path full --run.overwrite",
        "would delete",
        "; choose",
        prepare=[
            lambda place: shutil.copytree(place.path("sft"), place.path("full")),
            lambda place: shutil.move(place.path("base"), place.path("full/base")),
            edit("full/hydra.json", lambda content: content.update(base={"name_or_path": "base", "relative": True})),
        ],
    ),
    "output is held": cli(
        "ppo run.yaml --resume", "run.output='run' is being written by process", "; wait for it", prepare=[hold_lock]
    ),
    "output to be overwritten is held": cli(
        "ppo run.yaml --run.overwrite", "run.output='run' is being written", "; wait for it", prepare=[hold_lock]
    ),
    "output to be gone on with is no run": cli(
        "ppo ppo.yaml --run.output base --resume", "run.output='base' is not empty and holds no run; choose"
    ),
    "output with a zero byte": Case([*PPO, "--run.output", "a\0b"], ("run.output=", "; choose")),
    "output too long for a name": Case([*PPO, "--run.output", "x" * 300], ("run.output=", "; choose")),
    "no tracker": cli(
        "ppo ppo.yaml --run.trackers [wandb]", "run.trackers=[wandb]", "not installed; run pip", prepare=[no_trackers]
    ),
    "dry run of a torn model": cli(
        "ppo ppo.yaml --dry-run", "model.safetensors", "; copy", prepare=[cut("base/model.safetensors")]
    ),
    "dry run of bad data": cli("ppo ppo.yaml --dry-run --data.train gone.jsonl", "gone.jsonl: no such file; check"),
    "dry run of a run to be gone on with": cli("sft sft.yaml --run.output run --resume --dry-run", "a run of ppo", "; choose"),
}

TABLE = {
    f"{part}: {name}": case
    for part, cases in (("config", CONFIG), ("data", DATA), ("checkpoints", CHECKPOINTS), ("cli", CLI))
    for name, case in cases.items()
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Settings, and what they came to: `sft` (a saved model), `run` (PPO on the base), `linear` (with another schedule)."""
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    here = Path()  # every path in a settings file is relative, so that a copy of the folder is as good as the folder
    short = {"steps": 2, "run": {"save_every": 1}, "eval_every": 0}
    files = {
        "ppo.yaml": ppo_settings(here, "new"),
        "sft.yaml": sft_settings(here, "new"),
        "run.yaml": ppo_settings(here, "run", **short),
        "linear.yaml": ppo_settings(here, "linear", **short, optimizer={"schedule": "linear"}),
        "sft-run.yaml": sft_settings(here, "sft", epochs=2),
    }
    for name, content in files.items():
        (folder / name).write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command, name in (("ppo", "run.yaml"), ("ppo", "linear.yaml"), ("sft", "sft-run.yaml")):
            assert main([command, name]) == 0
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every file below a folder with its content; a folder has none."""
    found = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in found
        if "__pycache__" not in path.parts
    }


def forbid(what: str) -> Callable[..., object]:
    def fail(*arguments: Any, **options: Any) -> None:
        pytest.fail(f"{what}, though it could be known before")

    return fail


# Every third at every `make test`; all of them in `make test-faults`.
@pytest.mark.parametrize("name", [n if i % 3 == 0 else pytest.param(n, marks=pytest.mark.long) for i, n in enumerate(TABLE)])
def test_bad_input(name, project, tmp_path, monkeypatch, capsys, fault):
    case = TABLE[name]
    folder = project  # where nothing is prepared, nothing may change either
    if case.prepare:
        folder = tmp_path / "project"
        shutil.copytree(project, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HYDRA_TRACEBACK", raising=False)
    with ExitStack() as after:
        for prepare in case.prepare:
            prepare(Place(folder, monkeypatch, after))
        before = tree(folder)
        if case.weights == "never":
            monkeypatch.setattr(commands, "load_model", forbid("a model was loaded"))
        if case.weights != "read":
            monkeypatch.setattr(loading, "load_whole", forbid("weights were read"))
        capsys.readouterr()
        code = main(case.argv)
        out, err = capsys.readouterr()
    print(err)
    assert code == 2, err
    assert tree(folder) == before, "the folder was changed"
    assert "Traceback" not in out + err
    lines = [line for line in err.splitlines() if line.strip()]
    if case.weights != "never":  # loading may say what it chose, and how far it is
        lines = [line for line in lines if not line.startswith(("attention=", "Loading weights:"))]
    assert len(lines) == 1, err
    for part in case.says:
        assert part in lines[0]
    assert out == ""
    fault(name, f"exit code 2: {lines[0][:100]}", "the folder, file by file")


def test_the_table_is_long_enough():
    assert len(TABLE) >= 70
