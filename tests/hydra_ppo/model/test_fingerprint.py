"""Digests change with what they stand for, and with nothing else."""

from __future__ import annotations

import json
import os

import pytest

from hydra_ppo.model import fingerprint
from hydra_ppo.model.fingerprint import file_digest, model_digests, model_folder, rows_digest, tokenizer_digest, weights_digest
from tests.training import tokenizer, write_model


@pytest.fixture
def large(monkeypatch):
    """Small files count as large ones: four places of 8 bytes are read."""
    monkeypatch.setattr(fingerprint, "WHOLE", 16)
    monkeypatch.setattr(fingerprint, "PLACES", 4)
    monkeypatch.setattr(fingerprint, "BLOCK", 8)


def write(path, content):
    """Write, with a time of its own, since a digest is remembered for as long as size and time are the same."""
    path.write_bytes(content)
    write.time += 10**9
    os.utime(path, ns=(write.time, write.time))
    return file_digest(path)


write.time = 10**18


def test_a_small_file_is_read_whole(tmp_path):
    content = bytes(1000)
    first = write(tmp_path / "a", content)
    assert write(tmp_path / "a", content) == first
    assert write(tmp_path / "b", content) == first
    for place in (0, 499, 999):
        assert write(tmp_path / "a", content[:place] + b"x" + content[place + 1 :]) != first
    assert write(tmp_path / "a", bytes(1001)) != first


def test_a_large_file_is_read_at_both_ends_and_in_between(tmp_path, large):
    content = bytes(100)
    first = write(tmp_path / "a", content)
    # Places 0, 30, 61 and 92 of 92 = 100 - 8, each with 8 bytes.
    seen = [i for i in range(100) if write(tmp_path / "a", content[:i] + b"x" + content[i + 1 :]) != first]
    assert seen == [*range(8), *range(30, 38), *range(61, 69), *range(92, 100)]
    assert write(tmp_path / "a", bytes(101)) != first


def test_a_model_is_its_config_and_weights(tmp_path):
    folder = write_model(tmp_path / "base")
    before = model_digests(folder)
    assert sorted(before) == ["config.json", "generation_config.json", "model.safetensors"]
    (folder / "README.md").write_text("a model")
    assert model_digests(folder) == before
    moved = json.loads((folder / "config.json").read_text()) | {"_name_or_path": "elsewhere"}
    (folder / "config.json").write_text(json.dumps(moved))
    assert model_digests(folder) == before  # where it lay computes nothing
    (folder / "config.json").write_text(json.dumps(moved | {"rms_norm_eps": 1e-3}))
    after = model_digests(folder)
    assert [name for name in before if before[name] != after[name]] == ["config.json"]
    assert weights_digest(str(folder)) == weights_digest(str(tmp_path / "." / "base"))
    assert weights_digest(str(tmp_path / "none")) is None
    assert model_folder("no/such/name/at-all") is None


def test_a_tokenizer_is_its_words_and_rules():
    first = tokenizer_digest(tokenizer())
    assert tokenizer_digest(tokenizer()) == first
    padded = tokenizer()
    padded("w1 w2", padding=True, truncation=True, max_length=4)  # leaves settings behind
    assert tokenizer_digest(padded) == first
    more, chat = tokenizer(), tokenizer()
    more.add_tokens(["w99"])
    chat.chat_template = "{{ messages }}"
    assert len({first, tokenizer_digest(more), tokenizer_digest(chat)}) == 3


def test_rows_and_their_order_and_parts():
    one, two = ("a", (1, 2)), ("b", (3,))
    digests = {rows_digest([one, two]), rows_digest([two, one]), rows_digest([one], [two]), rows_digest([one, two], [])}
    assert len(digests) == 4
    assert rows_digest([one, two]) == rows_digest(iter([one, two]))
