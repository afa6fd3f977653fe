"""Build the data and the base model of the real-text example from what every Python installation holds.

The text is English that people wrote: the docstrings of the standard library and the topics of pydoc. Passages
of prose are split into train and held-out; a byte-level BPE tokenizer and a Llama of 10 million parameters are
trained on the train passages; and preference pairs are cut from both sides. A pair's chosen response is the
true continuation of its prompt, its rejected one is taken from elsewhere, shuffled or cut off.

    python examples/real_text/prepare.py --output runs/real_text --seed 0
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
KINDS = ("elsewhere", "shuffled", "cut")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
PASSAGE_WORDS = 160  # longest passage; longer runs of paragraphs are split between paragraphs
PROMPT_TOKENS = (16, 32)  # shortest and longest prompt
RESPONSE_TOKENS = (16, 56)  # shortest and longest continuation
OVERLAP_WORDS = 8  # a held-out passage that shares a run of this many words with a train passage is dropped
FEWEST_PASSAGES = 500  # below this the installation has lost its sources
# Curly quotes, dashes and the ellipsis become what a keyboard has.
TYPOGRAPHY = str.maketrans({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-", 0x2026: "..."})

console = Console()


@dataclass(frozen=True)
class Passage:
    """Prose of one docstring or topic; `document` says which, so that a split never cuts through one."""

    document: str
    text: str


@dataclass(frozen=True)
class Training:
    """How the base is pretrained: 1 step sees `batch_size` rows of `length` tokens."""

    steps: int = 1400
    batch_size: int = 8
    length: int = 128  # tokens
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05


# ---------------------------------------------------------------- passages


def stdlib_files(root: Path) -> list[Path]:
    """List the standard library's modules below `root`, without its tests and installed packages."""
    return [path for path in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)]


def docstrings(source: str) -> Iterator[str]:
    """Yield every docstring of a module's source, dedented; a file that does not parse has none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def documents(root: Path) -> Iterator[Passage]:
    """Yield the docstrings below `root` and the topics of pydoc, as they stand."""
    for path in stdlib_files(root):
        name = path.relative_to(root).as_posix()
        for index, text in enumerate(docstrings(path.read_text(encoding="utf-8", errors="replace"))):
            yield Passage(f"{name}#{index}", text)
    for name, text in sorted(import_module("pydoc_data.topics").topics.items()):
        yield Passage(f"topic:{name}", cleandoc(text))


def is_prose(lines: list[str]) -> bool:
    """Tell a paragraph of sentences from code, doctests, tables, lists, grammars and headings."""
    text = re.sub(r"([.!?,:;][\"')]*)  ", r"\1 ", " ".join(line.strip() for line in lines))
    words = text.split()
    indents = [len(line) - len(line.lstrip()) for line in lines]
    letters = sum(char.isalpha() or char in " ,.'\"()" for char in text)
    return (
        len(words) >= 6
        and len(set(indents[1:])) <= 1
        and abs(indents[0] - indents[-1]) <= 4
        and re.match(r"[A-Za-z\"'(*`]", text) is not None
        and re.search(r"[.!?][\"')]*$", text) is not None
        and re.search(r">>>|::|\.\.\. |\|\||==|  | = |\\|<[a-z]|@|;$|https?:|\$|\{|\[\d", text) is None
        and letters / len(text) >= 0.9
        and sum(word.isupper() and len(word) > 1 for word in words) <= len(words) / 5
        and all(len(line.strip()) >= 36 for line in lines[:-1])
    )


def plain(lines: list[str]) -> str:
    """Join a paragraph's lines and take off typography: curly quotes, emphasis and literal marks."""
    text = " ".join(" ".join(lines).split())
    text = text.translate(TYPOGRAPHY)
    text = re.sub(r"``(.+?)``", r"\1", text)
    text = re.sub(r"`(.+?)'", r"'\1'", text).replace("`", "'")
    return re.sub(r"(?<!\w)[*_](\w[^*_]*)[*_](?!\w)", r"\1", text)


def prose(text: str) -> list[str]:
    """Return the paragraphs of prose in a docstring or topic, one line each."""
    blocks = [[line.rstrip() for line in block.splitlines() if line.strip()] for block in re.split(r"\n\s*\n", text)]
    return [plain(lines) for lines in blocks if lines and is_prose(lines)]


def passages(texts: Iterable[Passage]) -> list[Passage]:
    """Join the paragraphs of each document into passages of at most PASSAGE_WORDS words; every paragraph occurs once."""
    seen: set[str] = set()
    found = []
    for document in texts:
        current: list[str] = []
        for paragraph in prose(document.text):
            if paragraph.lower() in seen:
                continue
            seen.add(paragraph.lower())
            if current and len(" ".join([*current, paragraph]).split()) > PASSAGE_WORDS:
                found.append(Passage(document.document, " ".join(current)))
                current = []
            current.append(paragraph)
        if current:
            found.append(Passage(document.document, " ".join(current)))
    return found


def word_runs(text: str, length: int = OVERLAP_WORDS) -> set[tuple[str, ...]]:
    """Return all runs of `length` successive words, lower-cased and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def split(found: list[Passage], seed: int, eval_fraction: float = 0.1) -> tuple[list[Passage], list[Passage]]:
    """Split by document into train and held-out; held-out passages that repeat train text are dropped."""
    names = sorted({passage.document for passage in found})
    random.Random(seed).shuffle(names)
    held_out = set(names[: round(eval_fraction * len(names))])
    train = [passage for passage in found if passage.document not in held_out]
    known = set().union(*(word_runs(passage.text) for passage in train))
    rest = [passage for passage in found if passage.document in held_out]
    return train, [passage for passage in rest if not word_runs(passage.text) & known]


# ---------------------------------------------------------------- preference pairs


def sentence_starts(words: list[str]) -> list[int]:
    """Return the indices at which a sentence begins, and `len(words)` at the end."""
    starts = [0]
    for i, (word, following) in enumerate(pairwise(words), start=1):
        ends = re.search(r"[.!?][\"')]*$", word) and not re.fullmatch(r"\(?(e\.g|i\.e|etc|cf|vs|resp|[A-Za-z])\.\)?", word)
        if ends and re.match(r"[\"'(]*[A-Z]", following):
            starts.append(i)
    return [*starts, len(words)]


def windows(lengths: list[int], starts: list[int], rng: random.Random) -> list[tuple[int, int, int]]:
    """Choose (begin, cut, end) word indices: the prompt is words[begin:cut], its continuation words[cut:end].

    `lengths` are the words' token counts. A window begins and ends at sentence boundaries and fits
    PROMPT_TOKENS and RESPONSE_TOKENS; each sentence begins at most one window.
    """
    tokens_before = [0]
    for length in lengths:
        tokens_before.append(tokens_before[-1] + length)
    chosen = []
    for begin in starts[:-1]:
        wanted = rng.randint(*PROMPT_TOKENS)
        cut = next((i for i in range(begin + 1, len(lengths)) if tokens_before[i] - tokens_before[begin] >= wanted), None)
        if cut is None or tokens_before[cut] - tokens_before[begin] > PROMPT_TOKENS[1]:
            continue
        ends = [end for end in starts if RESPONSE_TOKENS[0] <= tokens_before[end] - tokens_before[cut] <= RESPONSE_TOKENS[1]]
        ends = [end for end in ends if end - cut >= 8]
        if ends:
            chosen.append((begin, cut, rng.choice(ends)))
    return chosen


def token_counts(words: list[str], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Count each word's tokens, its leading space included; byte-level BPE never merges across spaces."""
    return [len(ids) for ids in tokenizer([" " + word for word in words], add_special_tokens=False)["input_ids"]]


def shuffled(response: str, rng: random.Random) -> str:
    """Put the words in random order, never the original one."""
    words = response.split()
    order = list(words)
    while order == words:
        rng.shuffle(order)
    return " " + " ".join(order)


def cut_off(response: str, rng: random.Random) -> str:
    """Keep the first 30 to 70 per cent of the words and stop in the middle of a sentence."""
    words = response.split()
    inside = [i for i in range(math.ceil(0.3 * len(words)), int(0.7 * len(words)) + 1) if re.search(r"\w$", words[i - 1])]
    count = rng.choice(inside or [max(1, len(words) // 2)])
    return " " + " ".join(words[:count]).rstrip(".,:;!?")


def make_pairs(found: list[Passage], tokenizer: PreTrainedTokenizerFast, seed: int) -> list[dict[str, str]]:
    """Cut preference pairs from passages: the rejected kinds come in equal thirds, in random order.

    Responses begin with the space that separates them from their prompt.
    """
    rng = random.Random(seed)
    rows = []
    for passage in found:
        words = passage.text.split()
        for begin, cut, end in windows(token_counts(words, tokenizer), sentence_starts(words), rng):
            rows.append((passage.document, " ".join(words[begin:cut]), " " + " ".join(words[cut:end])))
    rng.shuffle(rows)
    pairs = []
    for i, (document, prompt, chosen) in enumerate(rows):
        kind = KINDS[i % len(KINDS)]
        if kind == "shuffled":
            rejected = shuffled(chosen, rng)
        elif kind == "cut":
            rejected = cut_off(chosen, rng)
        else:
            rejected = rng.choice([row for row in rng.sample(rows, min(8, len(rows))) if row[0] != document])[2]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": kind})
    return pairs


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- tokenizer and model


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; `<eos>` both ends a text and stands before its beginning."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS, clean_up_tokenization_spaces=False
    )


def base_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Shape the base: about 10 million parameters, and every linear layer's inputs a multiple of nf4's block of 64."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """Concatenate the texts, each followed by `<eos>`, and cut them into rows: (rows, length) token ids."""
    ids = [i for row in tokenizer(texts)["input_ids"] for i in [*row, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batches(texts: list[str], tokenizer: PreTrainedTokenizerFast, training: Training, seed: int) -> Iterator[torch.Tensor]:
    """Yield (batch_size, length) token ids for ever; every epoch packs the texts in a new order."""
    rng = random.Random(seed)
    while True:
        rows = pack(rng.sample(texts, len(texts)), tokenizer, training.length)
        for i in range(0, len(rows) - training.batch_size + 1, training.batch_size):
            yield rows[i : i + training.batch_size]


def bf16_is_faster() -> bool:
    """Time one matrix product in both types on this CPU."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 384, dtype=dtype), torch.ones(384, 1024, dtype=dtype)
        a @ b
        begin = time.perf_counter()
        for _ in range(10):
            a @ b
        seconds[dtype] = time.perf_counter() - begin
    return seconds[torch.bfloat16] < seconds[torch.float32]


def autocast(bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def learning_rate(step: int, training: Training) -> float:
    """Rise linearly from 0, then fall along a cosine to a twentieth of the peak."""
    warmup = max(1, round(training.warmup_fraction * training.steps))
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, training.steps - warmup)
    return training.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices, but neither the embedding nor the norms."""
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    kept = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def pretrain(
    model: LlamaForCausalLM, texts: list[str], tokenizer: PreTrainedTokenizerFast, training: Training, seed: int, bf16: bool
) -> float:
    """Train all weights on packed texts and return the seconds it took."""
    optimizer = torch.optim.AdamW(parameter_groups(model, training.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
    stream = batches(texts, tokenizer, training, seed)
    columns = (TextColumn("pretraining"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    model.train()
    begin = time.perf_counter()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("pretraining", total=training.steps, loss=math.nan)
        for step in range(training.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, training)
            input_ids = next(stream)
            with autocast(bf16):
                loss = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, loss=loss.item())
    return time.perf_counter() - begin


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> float:
    """Return exp of the mean negative log-likelihood per token over the packed texts."""
    model.eval()
    losses = [model(input_ids=rows, labels=rows).loss for rows in pack(texts, tokenizer, length).split(16)]
    return math.exp(torch.stack(losses).mean().item())


# ---------------------------------------------------------------- the program


def prepare(output: Path, seed: int, training: Training, threads: int) -> None:
    """Write `data/train.jsonl`, `data/eval.jsonl` and `base/` below `output`, and print the numbers."""
    begin = time.perf_counter()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    found = passages(documents(Path(sysconfig.get_paths()["stdlib"])))
    if len(found) < FEWEST_PASSAGES:
        raise SystemExit(
            f"stdlib holds only {len(found)} passages of prose, fewer than {FEWEST_PASSAGES}; "
            "run this with a Python that has its library's sources."
        )
    train, held_out = split(found, seed)
    train_texts, eval_texts = [[passage.text for passage in part] for part in (train, held_out)]
    tokenizer = train_tokenizer(train_texts)
    console.print(f"passages  {len(train)} train, {len(held_out)} held out")
    for name, part in (("train", train), ("eval", held_out)):
        pairs = make_pairs(part, tokenizer, seed)
        write_jsonl(output / "data" / f"{name}.jsonl", pairs)
        console.print(f"{name:<9} {len(pairs)} pairs", dict(Counter(pair["kind"] for pair in pairs)))

    model = LlamaForCausalLM(base_config(tokenizer))
    tokens = pack(train_texts, tokenizer, 1).numel()
    seen = training.steps * training.batch_size * training.length
    bf16 = bf16_is_faster()
    console.print(f"base      {model.num_parameters() / 1e6:.1f} million parameters, {tokens} train tokens")
    console.print(f"          {training.steps} steps ({seen / tokens:.1f} epochs) in {'bf16' if bf16 else 'fp32'}")
    seconds = pretrain(model, train_texts, tokenizer, training, seed, bf16)
    console.print(f"          {seconds:.0f} s, {1000 * seconds / max(1, training.steps):.0f} s per 1000 steps")
    console.print(f"          held-out perplexity {perplexity(model, eval_texts, tokenizer, 2 * training.length):.1f}")
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    console.print(f"done      {time.perf_counter() - begin:.0f} s, in {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the data and the base model of the real-text example.")
    parser.add_argument("--output", type=Path, default=Path("runs/real_text"), help="folder under which data/ and base/ go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the pairs and the weights")
    parser.add_argument("--steps", type=int, default=Training.steps, help="pretraining steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    prepare(args.output, args.seed, Training(steps=args.steps), args.threads)


if __name__ == "__main__":
    main()
