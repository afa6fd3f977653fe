"""Rows in, tokens out: formats, bad rows, limits and tokenizers, each as a table of cases."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hydra_ppo.config.settings import DataSettings
from hydra_ppo.data.rows import Loaded, ensure_pad_token, load_preferences, load_prompts
from hydra_ppo.errors import ConfigError, DataError

BOS, EOS, PAD, END = 0, 1, 2, 3
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
NO_CONTINUATION = "{{ messages | length }}" + CHATML
HH = "\n\nHuman: Hi\n\nAssistant:"


def make_tokenizer(special="{}", template=None, **tokens):
    """One token per byte; `special` says which specials surround a text, for example "<bos> {} <eos>"."""
    vocab = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, "<end>": END}
    vocab |= {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), len(vocab))}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if special != "{}":
        single = special.format("$A")
        ids = [(token, vocab[token]) for token in single.split() if token in vocab]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "additional_special_tokens": ["<end>"]} | tokens
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in tokens.items() if v})
    tokenizer.chat_template = template
    return tokenizer


PLAIN = make_tokenizer()
CHAT = make_tokenizer("<bos> {}", CHATML, eos_token="<end>")


def ids_of(text, tokenizer=PLAIN):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def data(**changes):
    return DataSettings(train="unused", **changes)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair(prompt="Q:", chosen=" yes", rejected=" no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def texts(row):
    return row.prompt_text, row.chosen_text, row.rejected_text


def write(path, rows):
    """Write rows to a file of the type its extension names."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def message(excinfo):
    text = str(excinfo.value)
    assert "\n" not in text
    return text


# Tokens and limits


@pytest.mark.parametrize("special", ["{}", "<bos> {}", "{} <eos>", "<bos> {} <eos>"])
def test_plain_prompts_keep_bos_and_lose_eos(special):
    row = load_preferences([pair()], make_tokenizer(special), data()).rows[0]
    start = (BOS,) if "<bos>" in special else ()
    assert row.prompt_ids == (*start, *ids_of("Q:"))
    assert row.chosen_ids == (*ids_of(" yes"), EOS)


def test_written_eos_is_not_doubled():
    row = load_preferences([pair(chosen=" yes<eos>", rejected=" no<eos>\n")], PLAIN, data()).rows[0]
    assert (row.chosen_ids, row.rejected_ids) == ((*ids_of(" yes"), EOS), (*ids_of(" no"), EOS))


@pytest.mark.parametrize(
    ("limit", "chosen", "cut"),
    [
        (5, (*ids_of(" yes"), EOS), 0),  # 4 bytes and EOS
        (4, ids_of(" yes"), 1),  # cut just before its EOS: it carries none
        (2, ids_of(" y"), 1),
    ],
)
def test_long_responses_are_cut(limit, chosen, cut):
    loaded = load_preferences([pair(rejected=" n")], PLAIN, data(max_response_tokens=limit))
    assert loaded.rows[0].chosen_ids == chosen
    assert loaded.reasons.get(f"chosen cut to data.max_response_tokens={limit}", 0) == cut
    assert loaded.skipped == 0


def test_pairs_that_are_equal_once_cut_are_dropped():
    rows = [pair(chosen=" long a", rejected=" long b"), pair()]
    loaded = load_preferences(rows, PLAIN, data(max_response_tokens=3))
    assert (len(loaded.rows), loaded.skipped, loaded.reasons["chosen and rejected have the same tokens"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("special", "limit", "expected"),
    [
        ("{}", 3, ids_of("cde")),
        ("<bos> {}", 3, (BOS, *ids_of("de"))),
        ("<bos> {}", 1, ids_of("e")),
        ("<bos> {}", 6, (BOS, *ids_of("abcde"))),
    ],
)
def test_truncation_keeps_the_end_and_bos(special, limit, expected):
    tokenizer = make_tokenizer(special)
    loaded = load_prompts([{"prompt": "abcde"}], tokenizer, data(max_prompt_tokens=limit))
    read = tokenizer.decode(expected, skip_special_tokens=True)  # the text is what the policy reads
    assert (loaded.rows[0].text, loaded.rows[0].ids) == (read, expected)
    assert loaded.reasons == ({f"prompt cut to data.max_prompt_tokens={limit}": 1} if limit < 6 else {})


def test_long_prompts_dropped_or_refused():
    rows = [{"prompt": "abcde"}, {"prompt": "ab"}]
    loaded = load_prompts(rows, PLAIN, data(max_prompt_tokens=3, long_prompts="drop"))
    assert ([row.text for row in loaded.rows], loaded.skipped) == (["ab"], 1)
    assert loaded.reasons == {"prompt is over data.max_prompt_tokens=3 (data.long_prompts=drop)": 1}
    with pytest.raises(
        DataError, match=r"1 of 2 .* row 1: prompt is over data.max_prompt_tokens=3 \(data.long_prompts=error\)"
    ):
        load_prompts(rows, PLAIN, data(max_prompt_tokens=3, long_prompts="error"))


@pytest.mark.parametrize("prompt", ["<eos>", "<bos>"])
def test_prompt_of_special_tokens_alone(prompt):
    with pytest.raises(DataError, match="prompt has no tokens"):
        load_prompts([{"prompt": prompt}], PLAIN, data())


def test_pad_token():
    assert ensure_pad_token(make_tokenizer(pad_token="<pad>")) == PAD
    tokenizer = make_tokenizer()
    assert ensure_pad_token(tokenizer) == EOS
    assert (tokenizer.pad_token, len(tokenizer)) == (None, len(PLAIN))  # it stays as it came


def test_eos_is_needed():
    tokenizer = make_tokenizer(eos_token=None)
    for call in (
        lambda: ensure_pad_token(tokenizer),
        lambda: load_prompts(["never read"], tokenizer, data()),
        lambda: load_preferences(["never read"], tokenizer, data()),
    ):
        with pytest.raises(ConfigError, match=r"tokenizer.eos_token=None .*; set eos_token"):
            call()


# Robustness

texts_strategy = st.text(st.characters(codec=None), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts_strategy,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts_strategy, inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", 1]), "content": texts_strategy | json_values}
    ),
    max_size=4,
)
fields = texts_strategy | messages | json_values
objects = st.fixed_dictionaries({}, optional={"prompt": fields, "chosen": fields, "rejected": fields, "other": json_values})
lists = st.fixed_dictionaries(
    {"prompt": fields, "responses": st.lists(fields, max_size=3) | json_values},
    optional={
        "ratings": st.lists(st.integers() | json_values, max_size=3) | json_values,
        "messages": fields,
        "tools": st.lists(json_values, max_size=2) | json_values,
        "chat_template_kwargs": json_values,
    },
)
lenient = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load_or_refuse(path, **changes):
    for load in (load_preferences, load_prompts):
        for skip_bad_rows in (False, True):
            for tokenizer in (PLAIN, CHAT):
                try:
                    limits = data(skip_bad_rows=skip_bad_rows, max_prompt_tokens=6, max_response_tokens=3, **changes)
                    loaded = load(path, tokenizer, limits)
                except DataError:
                    continue
                assert isinstance(loaded, Loaded)
                assert loaded.rows


@lenient
@given(content=st.binary(max_size=60))
def test_arbitrary_bytes(tmp_path, content):
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        load_or_refuse(path)


@lenient
@given(rows=st.lists(objects | json_values, max_size=4))
def test_arbitrary_objects(tmp_path, rows):
    load_or_refuse(write(tmp_path / "a.jsonl", rows))


@lenient
@given(rows=st.lists(lists | json_values, max_size=3))
def test_arbitrary_lists(tmp_path, rows):
    path = write(tmp_path / "a.jsonl", rows)
    for form in ("ranked", "rated"):
        load_or_refuse(path, format=form)
    load_or_refuse(path, columns={"chosen": "responses", "rejected": "tools.a", "messages": "ratings"})


@pytest.mark.parametrize(
    "line", ['{"prompt": ' + "[" * 100_000, '{"prompt": ' + "1" * 10_000 + "}", '{"prompt": "\\ud800"}', "NaN", '"a"']
)
def test_hostile_lines(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{line}\n{{"prompt": "good"}}\n')
    loaded = load_prompts(path, PLAIN, data(skip_bad_rows=True))
    assert ([row.text for row in loaded.rows], loaded.skipped) == (["good"], 1)


def test_import_is_light():
    code = "import sys, hydra_ppo.data.rows; print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
