"""Where answers end: what the template puts there, the tokenizer's end, the generation config's as far as special."""

from __future__ import annotations

import pytest

from hydra_ppo.data.ends import Ends, find_ends, template_end
from hydra_ppo.errors import ConfigError
from tests.hydra_ppo.test_data import BOS, CHATML, END, EOS, PAD, make_tokenizer

EOS_AFTER = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
END_THEN_EOS = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"  # Phi-3's kind
PARTS = (
    "{% for m in messages %}{% for part in m.content %}{% if part is string %}{{ raise_exception('parts, please') }}"
    "{% endif %}{{ part.text }}{% endfor %}<end>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "eos", "turn", "ids"),
    [
        (None, "<eos>", EOS, (EOS,)),
        (CHATML, "<end>", END, (END,)),
        (CHATML, "<eos>", END, (END, EOS)),  # Gemma 3, ChatML on a base: turns end in another token than texts
        (END_THEN_EOS, "<eos>", END, (END, EOS)),  # the first one counts: nothing after it is ever sampled
        (EOS_AFTER, "<eos>", EOS, (EOS,)),  # Llama 2, Mistral, Zephyr
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "<eos>", EOS, (EOS,)),  # a template without an end
        ("{{ raise_exception('never') }}", "<eos>", EOS, (EOS,)),
        (PARTS, "<eos>", END, (END, EOS)),
        (CHATML, None, END, (END,)),
    ],
)
def test_the_end_is_what_the_template_puts_after_an_answer(template, eos, turn, ids):
    found = find_ends(make_tokenizer(template=template, eos_token=eos))
    assert (found.turn, found.ids, found.notes) == (turn, ids, ())
    assert found.text == {EOS: "<eos>", END: "<end>"}[turn]
    assert found.describe() == f"answers end at {found.text} ({turn})"


def test_a_setting_comes_first():
    tokenizer = make_tokenizer(template=CHATML, eos_token="<end>")
    assert find_ends(tokenizer, end_of_turn="<eos>").ids == (EOS, END)
    with pytest.raises(ConfigError, match=r"data.end_of_turn='over and out' is 12 tokens of this tokenizer; name one token"):
        find_ends(tokenizer, end_of_turn="over and out")


def test_ids_of_the_generation_config_count_where_they_are_special():
    tokenizer = make_tokenizer(template=CHATML, pad_token="<pad>")
    assert find_ends(tokenizer, generation_ids=[EOS, END]).ids == (END, EOS)
    assert find_ends(tokenizer, generation_ids=[PAD, None]).ids == (END, EOS, PAD)
    word = tokenizer("x").input_ids[0]
    found = find_ends(tokenizer, generation_ids=[word, EOS, 5000])
    assert found.ids == (END, EOS)
    assert found.notes == (
        f"generation_config.eos_token_id={word} is the ordinary token 'x' of this tokenizer; it does not end a response",
        "generation_config.eos_token_id=5000 is no token of this tokenizer; it does not end a response",
    )


def test_an_end_must_be_somewhere():
    with pytest.raises(ConfigError, match=r"tokenizer.eos_token=None leaves responses without an end; set eos_token .* or"):
        find_ends(make_tokenizer(eos_token=None))
    assert find_ends(make_tokenizer(eos_token=None), generation_ids=[END]) == Ends(END, (END,), "<end>")


def test_added_tokens_need_not_be_special():
    """Fine-tunes add their end of a turn as an ordinary added token."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.chat_template = CHATML.replace("<end>", "<|im_end|>")
    assert template_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert BOS not in find_ends(tokenizer).ids
