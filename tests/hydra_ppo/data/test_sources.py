"""Files of every type, hub datasets and iterables give the same rows; what cannot be read is one line."""

import csv
import json

import pytest

from hydra_ppo.data.rows import check_source, load_preferences, load_prompts
from hydra_ppo.errors import DataError
from tests.hydra_ppo.test_data import CHAT, PLAIN, assistant, data, message, pair, user, write


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
        ("a.txt", b"x", "files of type '.txt' are not supported; use .jsonl, .json, .csv or .parquet."),
        ("a.csv", b"x", "holds no rows; give at least one."),
        ("a.csv", b"", "holds no rows; give at least one."),
        ("a.csv", b'prompt\n"never closed\nand so on\n', "line 3 is not CSV (unexpected end of data); put cells"),
        ("a.csv", b'prompt\n"a"b\n', "line 2 is not CSV ("),
        ("a.csv", b"prompt\na\n\xff\n", "line 3 is not valid UTF-8; save the file as UTF-8."),
        ("a.csv", b"prompt,chosen,prompt\na,b,c\n", "has two columns 'prompt'; give each its own name."),
        ("a.csv", b"a;b\n1;2\n", "has none of the columns prompt, chosen, rejected, messages; the columns are a;b: say with"),
        ("a.jsonl", "\ufeff".encode("utf-16"), "line 1 is not valid UTF-8; save the file as UTF-8."),
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


# CSV


def test_csv_says_what_the_same_rows_say_as_json(tmp_path):
    rows = [
        pair('Say "hi", please:', " hi\nthere", " no, never"),
        pair("3:", " 42", " 43"),  # numbers are text
        pair("long:", " " + "x" * 200_000, " y"),  # Python's csv stops at 131,072 characters
    ]
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:  # with a BOM and Windows newlines, as Excel writes it
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(rows)
    assert b"\r\n" in path.read_bytes()
    settings = data(max_response_tokens=300_000)
    assert load_preferences(path, PLAIN, settings).rows == load_preferences(rows, PLAIN, settings).rows
    assert [row.text for row in load_prompts(path, PLAIN, data()).rows] == ['Say "hi", please:', "3:", "long:"]
    assert check_source(path, "preferences") == 3


def test_csv_counts_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,gold\n"two\nlines",1\n\nshort\n,2\n')
    with pytest.raises(DataError) as excinfo:
        load_prompts(path, PLAIN, data())
    assert message(excinfo) == (
        f"{path}: 2 of 3 rows are malformed; first at line 5: 1 cells under a header of 2; "
        "fix them or set data.skip_bad_rows=true to drop them."
    )
    loaded = load_prompts(path, PLAIN, data(skip_bad_rows=True))
    assert [(row.text, row.columns) for row in loaded.rows] == [("two\nlines", {"gold": "1"})]
    assert loaded.reasons == {"1 cells under a header of 2": 1, "prompt is empty": 1}


# Columns that no format reads


def test_parquet_hands_other_columns_on(tmp_path):
    path = write(tmp_path / "a.parquet", [{"prompt": "Q", "gold": 4}])
    assert load_prompts(path, PLAIN, data()).rows[0].columns == {"gold": 4}


def test_windows_newlines_and_long_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("\r\n".join(json.dumps(pair(chosen=" " + "long " * 60_000)) for _ in range(2)).encode())
    loaded = load_preferences(path, PLAIN, data(max_response_tokens=4))
    assert [PLAIN.decode(row.chosen_ids) for row in loaded.rows] == [" lon"] * 2
