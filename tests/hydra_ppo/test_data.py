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
from hydra_ppo.data.rows import Loaded, check_source, ensure_pad_token, load_preferences, load_prompts, split_held_out
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


# Formats


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(pair(), ("Q:", " yes", " no"), id="explicit"),
        pytest.param(pair(chosen="Q: yes", rejected="Q: no"), ("Q:", " yes", " no"), id="prompt-repeated"),
        pytest.param(pair("Hi", "Hi there", "Go"), ("Hi", "Hi there", "Go"), id="begins-like-prompt-by-accident"),
        pytest.param(pair(None, "Q: a yes", "Q: a no"), ("Q: a", " yes", " no"), id="implicit-space"),
        pytest.param(pair(None, "Q\nyes", "Q\nyellow"), ("Q\n", "yes", "yellow"), id="implicit-newline"),
        pytest.param(pair(None, "is it yes", "is it yesterday"), ("is it", " yes", " yesterday"), id="implicit-inside-word"),
        pytest.param({"chosen": HH + " A b", "rejected": HH + " A c"}, (HH, " A b", " A c"), id="hh"),
        pytest.param(
            {"chosen": f"{HH} A\n\nHuman: B\n\nAssistant: x", "rejected": f"{HH} A\n\nHuman: B\n\nAssistant: y"},
            (f"{HH} A\n\nHuman: B\n\nAssistant:", " x", " y"),
            id="hh-two-turns",
        ),
    ],
)
def test_text_pairs(row, expected):
    loaded = load_preferences([row], PLAIN, data())
    assert [texts(row) for row in loaded.rows] == [expected]
    first = loaded.rows[0]
    assert first.prompt_ids == ids_of(expected[0])
    assert first.chosen_ids == (*ids_of(expected[1]), EOS)
    assert first.rejected_ids == (*ids_of(expected[2]), EOS)
    assert load_prompts([row], PLAIN, data()).rows[0].text == expected[0]


CHAT_TURN = "<|start|>user\nHi<end>\n<|start|>assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(pair([user("Hi")], [assistant("yes")], [assistant("no")]), id="explicit"),
        pytest.param(pair([user("Hi")], [user("Hi"), assistant("yes")], [assistant("no")]), id="prompt-repeated"),
        pytest.param(pair(None, [user("Hi"), assistant("yes")], [user("Hi"), assistant("no")]), id="implicit"),
        pytest.param(pair("Hi", [user("Hi"), assistant("yes")], [user("Hi"), assistant("no")]), id="ultrafeedback"),
        pytest.param(pair("Hi", [assistant("yes")], [assistant("no")]), id="text-prompt"),
        pytest.param(pair([user("Hi")], "yes", "no"), id="text-responses"),
        pytest.param(pair([user("Hi") | {"name": None}], [assistant("yes")], [assistant("no")]), id="null-keys"),
    ],
)
def test_chat_pairs(row):
    row = load_preferences([row], CHAT, data()).rows[0]
    assert texts(row) == (CHAT_TURN, "yes<end>\n", "no<end>\n")
    assert row.prompt_ids == ids_of(CHAT_TURN)  # the template is the whole text: no <bos> in front
    assert row.chosen_ids == (*ids_of("yes"), END)  # the template's EOS, once, without the newline behind it


def test_chat_response_gets_eos_where_the_template_gives_none():
    tokenizer = make_tokenizer(template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    row = load_preferences([pair([user("Hi")], "yes", "no")], tokenizer, data()).rows[0]
    assert texts(row) == ("[Hi]", "[yes]", "[no]")
    assert row.chosen_ids == (*ids_of("[yes]"), EOS)


@pytest.mark.parametrize(
    ("row", "tokenizer", "text"),
    [
        ({"prompt": "Hi"}, PLAIN, "Hi"),
        ({"prompt": "Hi", "chosen": None, "rejected": None}, PLAIN, "Hi"),
        ({"prompt": [user("Hi")]}, CHAT, CHAT_TURN),
        ({"prompt": ({"role": "user", "content": "Hi"},)}, CHAT, CHAT_TURN),
        (pair("Hi", "same", "same"), PLAIN, "Hi"),
    ],
)
def test_prompts(row, tokenizer, text):
    row = load_prompts([row], tokenizer, data()).rows[0]
    assert (row.text, row.ids) == (text, ids_of(text))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["Q"], "not an object"),
        ({"prompt": "Q", "rejected": "no"}, "chosen is missing"),
        (pair(chosen=None), "chosen is missing"),
        (pair(chosen=float("nan")), "chosen is neither text nor a list of messages"),
        (pair(chosen={"a": 1}), "chosen is neither text nor a list of messages"),
        (pair(prompt=3), "prompt is neither text nor a list of messages"),
        (pair(prompt=" \n"), "prompt is empty"),
        (pair(prompt=[]), "prompt is empty"),
        (pair(prompt=[user(" ")]), "prompt is empty"),
        (pair(rejected=[]), "rejected is empty"),
        (pair([user("Q")], [user("Q")], "no"), "one of chosen and rejected is text, the other messages"),
        (
            pair([user("Q")], [assistant("a")], [assistant("b"), user("c")]),
            "rejected does not start and end with an assistant message",
        ),
        (pair([user("Q"), assistant("A")], "yes", "no"), "prompt ends with an assistant message"),
        (pair([user("Q")], [{"role": "assistant"}], "no"), "chosen has a message without a text content"),
        (pair([user("Q")], [{"content": "a"}], "no"), "chosen has a message without a text role"),
        (pair([user("Q")], ["yes"], ["no"]), "chosen has a message that is not an object"),
        (pair(None, "yes", "no"), "prompt is missing, and chosen and rejected share none"),
        (
            pair(None, [user("Q"), assistant("a")], [user("P"), assistant("a")]),
            "prompt is missing, and chosen and rejected share none",
        ),
        (pair(chosen="\ud800"), "chosen is not valid Unicode"),
    ],
)
def test_bad_pairs(row, reason):
    for load in (lambda: load_preferences([row], PLAIN, data()), lambda: check_source([row], "preferences")):
        with pytest.raises(DataError) as excinfo:
            load()
        assert message(excinfo) == (
            f"examples: 1 of 1 rows is malformed; first at row 1: {reason}; fix it or set data.skip_bad_rows=true to drop it."
        )
    loaded = load_preferences([row, pair()], PLAIN, data(skip_bad_rows=True))
    assert (len(loaded.rows), loaded.skipped, loaded.reasons) == (1, 1, {reason: 1})
    assert check_source([row, pair()], "preferences", skip_bad_rows=True) == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(chosen="  "), "chosen is empty"),
        (pair(rejected=""), "rejected is empty"),
        (pair([user("Q")], [user("Q")], [assistant("no")]), "chosen is empty"),
        (pair([user("Q")], [assistant("")], [assistant("no")]), "chosen is empty"),
        (pair(chosen=" no"), "chosen equals rejected"),
        (pair(None, "same text", "same text"), "chosen equals rejected"),
        (pair(None, [user("Q"), assistant("a")], [user("Q"), assistant("a")]), "chosen equals rejected"),
    ],
)
def test_equal_and_empty_answers_are_dropped_unless_they_shall_stop(row, reason):
    good = pair() if isinstance(row["chosen"], str) else pair([user("Q")], [assistant("yes")], [assistant("no")])
    loaded = load_preferences([row, good], CHAT, data())
    assert (len(loaded.rows), loaded.skipped, loaded.reasons) == (1, 1, {reason: 1})
    assert check_source([row, good], "preferences") == 2
    strict = data(degenerate_pairs="error")
    for load in (
        lambda: load_preferences([row, good], CHAT, strict),
        lambda: check_source([row, good], "preferences", strict=True),
    ):
        with pytest.raises(DataError, match=f"1 of 2 rows is malformed; first at row 1: {reason}"):
            load()


@pytest.mark.parametrize(
    ("template", "prompt", "reason"),
    [
        (
            STRICT,
            [{"role": "system", "content": "S"}, user("Q")],
            "the chat template refuses the messages (TemplateError: no system role)",
        ),
        (NO_CONTINUATION, [user("Q")], "the chat template does not render chosen as a continuation of its prompt"),
    ],
)
def test_templates_that_do_not_fit(template, prompt, reason):
    with pytest.raises(DataError) as excinfo:
        load_preferences([pair(prompt)], make_tokenizer(template=template), data())
    assert f"first at row 1: {reason};" in message(excinfo)


@pytest.mark.parametrize("load", [load_preferences, load_prompts])
def test_chat_needs_a_template(load, tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(), pair([user("Q")])])
    with pytest.raises(DataError) as excinfo:
        load(path, PLAIN, data(skip_bad_rows=True))
    assert message(excinfo) == (
        f"{path}: line 2 holds chat messages, but the tokenizer has no chat template; "
        "use a chat model's tokenizer, set tokenizer.chat_template, or give plain text."
    )
    assert check_source(path, "preferences") == 2


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


# Sources


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("row", [pair(), pair([user("Q")], [assistant("yes")], [assistant("no")])])
def test_files(tmp_path, suffix, row):
    path = write(tmp_path / f"a{suffix}", [row | {"score": 1.5}] * 3)
    expected = load_preferences([row] * 3, CHAT, data())
    assert load_preferences(path, CHAT, data()) == expected
    assert load_preferences(tmp_path / f"a{suffix}", CHAT, data()) == expected
    assert len(load_prompts(path, CHAT, data()).rows) == 3
    assert check_source(path, "preferences") == check_source(path, "prompts") == 3
    assert check_source(path, "prompts", limit=2) == 2


def test_jsonl_counts_lines_and_ignores_blank_ones(tmp_path):
    path = tmp_path / "train.jsonl"
    good = json.dumps(pair())
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([good, "", "  ", "{oops", json.dumps(pair(chosen=3)), good, "[1]"]).encode())
    with pytest.raises(DataError) as excinfo:
        load_preferences(str(path), PLAIN, data())
    assert message(excinfo) == (
        f"{path}: 3 of 5 rows are malformed; first at line 4: not valid JSON; "
        "fix them or set data.skip_bad_rows=true to drop them."
    )
    loaded = load_preferences(path, PLAIN, data(skip_bad_rows=True))
    assert (len(loaded.rows), loaded.skipped) == (2, 3)
    assert loaded.reasons == {"not valid JSON": 1, "chosen is neither text nor a list of messages": 1, "not an object": 1}


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("none.jsonl", None, "no such file; check the path."),
        ("sub/none.parquet", None, "no such file; check the path."),
        ("a.csv", b"x", "files of type '.csv' are not supported; use .jsonl, .json or .parquet."),
        ("a.jsonl", b"", "holds no rows; give at least one."),
        ("a.jsonl", b'{"prompt": "a"}\n\xff\n', "line 2 is not valid UTF-8; save the file as UTF-8."),
        ("a.json", b'[\n\n"\xff"]', "line 3 is not valid UTF-8; save the file as UTF-8."),
        ("a.json", b"[]", "holds no rows; give at least one."),
        ("a.json", b'{"a": 1}', "does not hold a list; write a list of objects, or one object per line in a .jsonl file."),
        ("a.json", b"{}\n{}", "is not valid JSON (JSONDecodeError: Extra data: line 2 "),
        ("a.json", b"[" * 100_000, "is not valid JSON (RecursionError: "),
        ("a.parquet", b"PAR1 but not really PAR1", "cannot be read ("),
        ("a.parquet", b"", "cannot be read ("),
    ],
)  # fmt: skip
def test_unreadable_files(tmp_path, name, content, error):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for load in (lambda: load_prompts(str(path), PLAIN, data(skip_bad_rows=True)), lambda: check_source(path, "prompts")):
        with pytest.raises(DataError) as excinfo:
            load()
        assert message(excinfo).startswith(f"{path}: {error}")


def test_parquet_with_damaged_pages(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [{"prompt": f"prompt {i}"} for i in range(100)])
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(path, PLAIN, data())


def test_parquet_with_other_columns(tmp_path):
    with pytest.raises(DataError, match="has none of the columns prompt, chosen, rejected"):
        load_prompts(write(tmp_path / "a.parquet", [{"text": "a"}]), PLAIN, data())


@pytest.mark.parametrize("source", ["", 3, None])
def test_not_a_source(source):
    with pytest.raises(DataError):
        check_source(source, "prompts")


def test_no_usable_row():
    with pytest.raises(DataError) as excinfo:
        load_prompts([{}, {}, {"prompt": ""}], PLAIN, data(skip_bad_rows=True))
    assert message(excinfo) == (
        "examples: none of 3 rows is usable (2 x prompt is missing, 1 x prompt is empty); "
        "fix the rows or change the data settings."
    )


def test_iterables_are_read_once_and_lazily():
    rows = ({"prompt": f"p{i}"} for i in range(10))
    assert check_source(rows, "prompts", limit=4) == 4
    assert len(load_prompts(rows, PLAIN, data()).rows) == 6


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("owner/name", None, ("owner/name", None, "train")),
        ("owner/name.v1:config", "test", ("owner/name.v1", "config", "test")),
        ("name:config", "test[:10]", ("name", "config", "test[:10]")),
        ("name", None, ("name", None, "train")),
    ],
)
def test_hub_names(monkeypatch, source, split, expected):
    calls = []

    def load_dataset(path, config, *, split):
        calls.append((path, config, split))
        return [{"prompt": "Hi"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_prompts(source, PLAIN, data(), split=split).rows[0].text == "Hi"
    assert calls == [expected]


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(path, config, *, split):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError) as excinfo:
        load_prompts("owner/name", PLAIN, data())
    assert message(excinfo) == (
        "owner/name: cannot be loaded as a dataset with split 'train' (ConnectionError: no route); "
        "check the path or name, the split and the connection."
    )


def test_dataset_folder_and_dataset(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "test.jsonl", [pair(), pair(chosen=None)])
    with pytest.raises(DataError, match=r"folder: 1 of 2 rows is malformed; first at row 2: chosen is missing"):
        load_preferences(str(folder), PLAIN, data(), split="test")
    with pytest.raises(DataError, match="cannot be loaded as a dataset with split 'train'"):
        load_preferences(str(folder), PLAIN, data())
    assert len(load_preferences(datasets.Dataset.from_list([pair()]), PLAIN, data()).rows) == 1


# Held-out rows


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(100, 0.05, 5), (100, 0, 0), (10, 0.01, 1), (1, 0.5, 0), (2, 0.9, 1), (0, 0.5, 0)]
)
def test_split_held_out(count, fraction, held_out):
    rows = list(range(count))
    train, held = split_held_out(rows, fraction, seed=1)
    assert len(held) == held_out
    assert sorted(train + held) == rows
    assert (train, held) == (sorted(train), sorted(held))
    assert split_held_out(rows, fraction, seed=1) == (train, held)


def test_split_depends_on_the_seed():
    assert split_held_out(range(100), 0.1, 1) != split_held_out(range(100), 0.1, 2)
    with pytest.raises(ConfigError, match=r"eval_fraction=1 must lie in \[0, 1\)"):
        split_held_out([1], 1, 0)


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
lenient = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load_or_refuse(path):
    for load in (load_preferences, load_prompts):
        for skip_bad_rows in (False, True):
            for tokenizer in (PLAIN, CHAT):
                try:
                    loaded = load(
                        path, tokenizer, data(skip_bad_rows=skip_bad_rows, max_prompt_tokens=6, max_response_tokens=3)
                    )
                except DataError:
                    continue
                assert isinstance(loaded, Loaded)
                assert loaded.rows


@lenient
@given(content=st.binary(max_size=60))
def test_arbitrary_bytes(tmp_path, content):
    for suffix in (".jsonl", ".json", ".parquet"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        load_or_refuse(path)


@lenient
@given(rows=st.lists(objects | json_values, max_size=4))
def test_arbitrary_objects(tmp_path, rows):
    load_or_refuse(write(tmp_path / "a.jsonl", rows))


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
