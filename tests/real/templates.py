"""Chat templates of nine families, written anew, with the tokens that each puts around a turn.

They keep what matters of the originals: which tokens begin and end a turn, what follows the end, how a system message is
taken (Gemma writes it into the first turn of the user, Llama 2 into brackets), and what is trimmed.
"""

from __future__ import annotations

from dataclasses import dataclass

_SYSTEM_FIRST = "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"


@dataclass(frozen=True)
class Family:
    """A chat template and its tokens.

    Attributes:
        template: Jinja.
        end: what ends an answer.
        turns: tokens that the template writes; where a tokenizer lacks one, it is added as a special token.
        writes_bos: whether the template writes the begin token itself.
    """

    template: str
    end: str
    turns: tuple[str, ...] = ()
    writes_bos: bool = True


_GEMMA3 = (
    "{{ bos_token }}" + _SYSTEM_FIRST + "{% set first = system | trim + '\n\n' %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% if loop.first %}{{ first }}{% endif %}{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

_PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LLAMA2 = (
    _SYSTEM_FIRST + "{% set before = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' %}{% else %}{% set before = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (before if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_LLAMA4 = _LLAMA3.replace("start_header_id", "header_start").replace("end_header_id", "header_end").replace("eot_id", "eot")

_MISTRAL = (
    "{{ bos_token }}" + _SYSTEM_FIRST + "{% set before = system + '\n\n' %}{% else %}{% set before = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (before if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)

_TEKKEN = _MISTRAL.replace("'[INST] '", "'[INST]'").replace("' ' + m.content | trim", "m.content")

_QWEN25 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    + _CHATML
)

_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)

_SMOLLM2 = _QWEN25.replace("You are a helpful assistant.", "You are a helpful AI assistant named SmolLM.")

FAMILIES = {
    "gemma3": Family(_GEMMA3, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "phi3": Family(_PHI3, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), writes_bos=False),
    "chatml": Family(_CHATML, "<|im_end|>", ("<|im_start|>", "<|im_end|>"), writes_bos=False),
    "llama2": Family(_LLAMA2, "</s>"),
    "llama3": Family(_LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "llama4": Family(_LLAMA4, "<|eot|>", ("<|header_start|>", "<|header_end|>", "<|eot|>")),
    "mistral": Family(_MISTRAL, "</s>"),
    "tekken": Family(_TEKKEN, "</s>"),
    "qwen2.5": Family(_QWEN25, "<|im_end|>", ("<|im_start|>", "<|im_end|>"), writes_bos=False),
    "zephyr": Family(_ZEPHYR, "</s>", writes_bos=False),
    "smollm2": Family(_SMOLLM2, "<|im_end|>", ("<|im_start|>", "<|im_end|>"), writes_bos=False),
}
