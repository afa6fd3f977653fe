"""Runs TRL's own tests of its step-style PPO trainer (0.8 to 0.11) with and without the patch, which must change nothing.

    python tests/hosts/own_tests.py --output result.json

The tests come with TRL's source distribution. They name models of the hub: each gets a folder of that name where the tests
run, with random weights and a tokenizer made here. What needs the very weights of the hub fails both times.
TRL 0.12's file of that name only runs an example script on hub models, so it is not used.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LEAST = 20
"""Tests that must pass, of 27: fewer would mean that they did not run on the models made here."""

SIZE = 256
PAD = SIZE - 1  # the tests write out ids, small ones, that are no padding

TESTS = "test_ppo_trainer.py"
BESIDE = ("testing_constants.py", "testing_utils.py")

CONFTEST = """
import os
from pathlib import Path

import huggingface_hub

huggingface_hub.delete_repo = huggingface_hub.HfApi.delete_repo = lambda *_, **__: None  # what cleaning up would ask the hub


def pytest_sessionstart():
    if os.environ["HYDRA_PATCHED"] == "1":
        from transformers import LlamaConfig

        from hydra_ppo.model.hydra import HydraModel
        from hydra_ppo.patches.trl import apply

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        apply(HydraModel.from_config(LlamaConfig(vocab_size=32, **sizes)))
        Path("patched").touch()
"""


def main() -> None:
    """Fetch the tests, run them twice and compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, list[str]] = {"problems": [], "notes": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = fetch(folder / "source", f"trl=={version('trl')}")
        if source is None:
            found["problems"].append(f"pip gives no source distribution of trl=={version('trl')} with tests/{TESTS}")
        else:
            place(source, folder / "run")
            compare(run(folder / "run", patched=False), run(folder / "run", patched=True), found)
    options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def fetch(folder: Path, requirement: str) -> Path | None:
    """Return the folder of tests in a source distribution, which pip fetches and unpacks; None where there is none.

    The distributions were not made to be built from, and pip asks what they need as soon as they are unpacked: it fails, and
    leaves the files when told not to clean up.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-binary", "trl", "--no-deps"]
    command += ["--no-build-isolation", "--no-clean", "--dest", str(folder)]
    subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files = list(folder.glob(f"**/tests/{TESTS}"))
    return files[0].parent if files else None


def place(source: Path, folder: Path) -> None:
    """Lay out the tests, and the models that they name, in `folder`."""
    package = folder / "own"  # the name `tests` is taken, by us and by TRL
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    for name in (TESTS, *BESIDE):
        shutil.copy(source / name, package / name)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD}
    gpt2 = GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=5, n_head=4, n_positions=128, **ends)
    bloom = BloomConfig(vocab_size=SIZE, hidden_size=32, n_layer=2, n_head=4, **ends)
    t5 = T5Config(vocab_size=SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=PAD, **ends)
    for name, model, side in (
        ("gpt2", GPT2LMHeadModel(gpt2), "right"),
        ("trl-internal-testing/dummy-GPT2-correct-vocab", GPT2LMHeadModel(gpt2), "right"),
        ("trl-internal-testing/tiny-BloomForCausalLM-correct-vocab", BloomForCausalLM(bloom), "left"),
        ("trl-internal-testing/tiny-T5ForConditionalGeneration-correct-vocab", T5ForConditionalGeneration(t5), "right"),
    ):
        model.save_pretrained(folder / name)
        tokenizer(side).save_pretrained(folder / name)


def tokenizer(side: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words that counts as GPT-2's does on what the tests say: a space belongs to the next word."""
    words = ["This", "this", "is", "a", "another,", "longer", "test", "morning", "I", "went", "to", "the"]
    known = ["<end>", "<unk>", " ", *words, *(f" {word}" for word in words)]
    known += [*(f" w{number}" for number in range(PAD - len(known))), "<pad>"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+|\s"), "isolated")
    special = {"eos_token": "<end>", "bos_token": "<end>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=side, **special)


def run(folder: Path, patched: bool) -> dict[str, str]:
    """Run the tests in `folder` and return how each ended."""
    report = folder / f"report-{patched}.xml"
    variables = {**os.environ, "HYDRA_PATCHED": str(int(patched)), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"own/{TESTS}"]
    done = subprocess.run(command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout[-12000:])
    if not report.is_file() or (folder / "patched").exists() != patched:
        return {}
    found = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = [part.tag for part in case if part.tag in ("failure", "error", "skipped")]
        found[case.get("name", "")] = kinds[0] if kinds else "passed"
    return found


def compare(before: dict[str, str], after: dict[str, str], found: dict[str, list[str]]) -> None:
    """Note counts and differences in `found`."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            found["problems"].append(f"TRL's own {name}: {before.get(name)} as it is, {after.get(name)} with the patch")
    passed, failed = (sum(how == kind for how in after.values()) for kind in ("passed", "failure"))
    if passed < LEAST:
        found["problems"].append(f"{passed} of TRL's own tests pass, not {LEAST}")
    failures = ", ".join(name for name, how in after.items() if how in ("failure", "error"))
    found["notes"].append(
        f"TRL's own tests of its trainer, patched as unpatched: {passed} of {len(after)} pass; fail: {failures or 'none'} "
        f"({failed}); skipped {sum(how == 'skipped' for how in after.values())}"
    )


if __name__ == "__main__":
    main()
