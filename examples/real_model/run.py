"""Run the real-model example end to end and check what came of it.

    python examples/real_model/run.py [--output runs/real_model] [--seed 0]

The commands are those that a user would type: PPO of SmolLM2-135M-Instruct on a Python function; joint SFT and reward modelling
on its own answers as VADER rates them; PPO against the head that came of it; then samples, export, and a few steps on a 4-bit
base.
The exit code is 1 where a bound below is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CLI = ("-m", "hydra_ppo.cli")
STANDARD_ERRORS, NATS = 3, 20.0
ONE_ANSWER = 0.005  # of 2,600 runs of four words: what a single answer that repeats itself brings
SAMPLES = 4  # answers to each instruction, which VADER rates for the reward head
SHOWN = 6
QUESTION = "Tell me about a noisy fridge."

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
torch.manual_seed(0)
ids = model.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=0.7)
answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
print("transformers alone, without this package:", repr(answer))
"""


class Steps:
    """Runs commands, says what they are and keeps how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, *words: object) -> None:
        """Run Python with these words."""
        line = [str(word) for word in words]
        print("$ python", " ".join("..." if "\n" in word else word for word in line), flush=True)
        begun = time.perf_counter()
        subprocess.run([sys.executable, *line], check=True)
        self.seconds[name] = time.perf_counter() - begun


def run(output: Path, seed: int, steps: Steps) -> dict[str, Any]:
    """Run every command; return the judgement of both PPO runs, with their own summaries."""
    shutil.rmtree(output, ignore_errors=True)
    data, base = output / "data", output / "base"
    steps("prepare", HERE / "prepare.py", "--output", output, "--seed", seed)
    common = ["--model.dtype", (output / "dtype").read_text(), "--run.seed", seed, "--run.overwrite", "true"]
    prompts = ["--data.train", data / "train.jsonl", "--data.eval", data / "eval.jsonl"]

    on_function = ["--model.name_or_path", base, "--run.output", output / "ppo"]
    steps("ppo", *CLI, "ppo", HERE / "ppo.yaml", *prompts, *common, *on_function)

    asked, said, rated = (data / f"{name}.jsonl" for name in ("train", "said", "rated"))
    sampling = ["--seed", seed, "--batch-size", 64]
    from_base = ["--role", "base", "--prompts", asked, "--samples", SAMPLES, "--output", said]
    steps("sample", *CLI, "generate", output / "ppo", *from_base, *sampling)
    steps("rate", HERE / "rate.py", "--prompts", asked, "--answers", said, "--output", rated)
    learned = ["--data.train", rated, "--model.name_or_path", base, "--run.output", output / "sft"]
    steps("sft", *CLI, "sft", HERE / "sft.yaml", *learned, *common)
    on_head = ["--model.name_or_path", output / "sft", "--run.output", output / "ppo_head"]
    steps("ppo_head", *CLI, "ppo", HERE / "ppo_head.yaml", *prompts, *common, *on_head)

    found = {}
    for name in ("ppo", "ppo_head"):
        files = {role: output / f"{name}_{role}.jsonl" for role in ("reference", "actor")}
        for role, file in files.items():
            words = [output / name, "--role", role, "--prompts", data / "eval.jsonl", "--output", file, *sampling]
            steps(f"{name} {role}", *CLI, "generate", *words)
        judged = output / f"{name}.json"
        both = ["--before", files["reference"], "--after", files["actor"]]
        steps(f"{name} judge", HERE / "judge.py", *both, "--output", judged)
        summary = json.loads((output / name / "summary.json").read_text(encoding="utf-8"))
        found[name] = json.loads(judged.read_text(encoding="utf-8")) | {"summary": summary}
    found["sft"] = {"summary": json.loads((output / "sft" / "summary.json").read_text(encoding="utf-8"))}

    steps("export", *CLI, "export", output / "ppo", "--output", output / "exported")
    steps("transformers", "-c", PLAIN, output / "exported", QUESTION)
    few = ["--steps", 2, "--rollout.batch_size", 8, "--minibatch_size", 8, "--microbatch_size", 8, "--eval_prompts", 4]
    few += ["--rollout.max_new_tokens", 16, "--model.quantization", "nf4", "--run.output", output / "nf4"]
    steps("nf4", *CLI, "ppo", HERE / "ppo.yaml", *prompts, *common, "--model.name_or_path", base, *few)
    return found


def checks(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return (what, found, met) of each bound."""
    rows = []
    for name, what in (("ppo", "function"), ("ppo_head", "learned head")):
        part, kl = found[name], found[name]["summary"]["eval_kl"]
        errors = part["gain"] / part["gain_se"]
        scores = f"{part['vader_before']:.3f} -> {part['vader_after']:.3f} = {errors:.1f} s.e."
        grams = part["repeated_4grams_before"], part["repeated_4grams_after"]
        rows += [
            (
                f"{what}: VADER of {part['answers']} held-out answers, up {STANDARD_ERRORS} s.e.",
                scores,
                errors >= STANDARD_ERRORS,
            ),
            (f"{what}: KL, below {NATS:.0f} nats per answer", f"{kl:.2f}", kl < NATS),
            (
                f"{what}: repeated 4-grams, not doubled",
                f"{grams[0]:.4f} -> {grams[1]:.4f}",
                grams[1] <= 2 * grams[0] + ONE_ANSWER,
            ),
        ]
    return rows


def written_samples(found: dict[str, Any]) -> str:
    """Return samples before and after PPO as Markdown."""
    lines = ["# Held-out instructions, before and after PPO", ""]
    for name, what in (("ppo", "VADER itself as the reward"), ("ppo_head", "A learned head as the reward, VADER as the judge")):
        lines += [f"## {what}", ""]
        for sample in found[name]["samples"][:SHOWN]:
            lines += [f"**{sample['prompt']}**", ""]
            for when in ("before", "after"):
                text, score = sample[when]
                lines += [f"- {when} ({score:+.2f}): {' '.join(text.split())}"]
            lines += [""]
    return "\n".join(lines)


def processor() -> str:
    """Return what the processor calls itself."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/real_model"), help="folder of model, data and runs; emptied first"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every stage")
    args = parser.parse_args()
    begun, load, steps = time.perf_counter(), os.getloadavg()[0], Steps()
    found = run(args.output, args.seed, steps)
    seconds = time.perf_counter() - begun
    written = written_samples(found)
    (args.output / "samples.md").write_text(written, encoding="utf-8")
    print(written)
    rows = checks(found)
    where = f"{processor()}, load {load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end"
    result = {"seed": args.seed, "seconds": seconds, "steps": steps.seconds, "machine": where}
    result |= {"checks": [{"what": what, "found": text, "met": met} for what, text, met in rows], "runs": found}
    (args.output / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    plots = ", ".join(str(args.output / name / "plots") for name in ("ppo", "sft", "ppo_head"))
    table = Table(
        title=f"SmolLM2-135M-Instruct, seed {args.seed}", caption=f"{seconds:.0f} s in all on {where}; plots in {plots}"
    )
    for column in ("what", "found", "met"):
        table.add_column(column)
    for what, text, met in rows:
        table.add_row(what, text, "yes" if met else "NO")
    times = ", ".join(f"{name} {spent:.0f}" for name, spent in steps.seconds.items())
    Console().print(table)
    print(f"seconds: {times}; samples in {args.output / 'samples.md'}")
    return 0 if all(met for *_, met in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
