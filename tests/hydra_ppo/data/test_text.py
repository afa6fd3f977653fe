"""Kinds of chat templates and tokenizers that real files have, in small; tests/real has the files themselves."""

from __future__ import annotations

from hydra_ppo.data.text import Codec
from tests.hydra_ppo.test_data import END, assistant, data, ids_of, make_tokenizer, user

SYSTEM = {"role": "system", "content": "Be brief."}

SYSTEM_IN_LAST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ system + ' ' if system and loop.last else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}<end>{% endif %}{% endfor %}"
)
"""As Mistral 7B v0.3, Nemo and Small: the system message goes into the last message, if that is the user's."""


def test_a_template_that_writes_the_system_message_into_the_last_turn():
    tokenizer = make_tokenizer(template=SYSTEM_IN_LAST)
    codec = Codec(tokenizer, data())
    prompt = codec.prompt([SYSTEM, user("Hi"), assistant("Yes?"), user("Go on.")])
    assert prompt.text == "[INST] Hi[/INST] Yes?<end>[INST] Be brief. Go on.[/INST]"
    assert codec.answer("chosen", prompt, [assistant("No.")]).ids == (*ids_of(" No.", tokenizer), END)
