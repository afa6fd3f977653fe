"""Whatever the files and the command line hold: success, or one line of error and exit code 2; nothing is written."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_ppo.cli.flags import OPTIONS, parse
from hydra_ppo.cli.main import COMMANDS, main
from hydra_ppo.config.reading import settings_of
from hydra_ppo.config.settings import DataSettings, PPOConfig, SFTConfig
from hydra_ppo.data.rows import check_source, load_preferences, load_prompts
from hydra_ppo.errors import ConfigError, DataError
from tests.faults.project import quick_first
from tests.training import tokenizer

CONFIGS = {"ppo": PPOConfig, "sft": SFTConfig}
TOKENIZER = tokenizer()


def bounded(examples: int) -> Any:
    """Settings of a test: the same examples each time, and no clock."""
    # The folder is made once; each example writes its file anew.
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=health)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model and rows that a dry run takes."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(bytes(8))
    rows = [{"prompt": f"question {i}: ", "chosen": "yes", "rejected": "no"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_TRACEBACK", raising=False)
    return tmp_path


def tree(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return what lies in a folder, with times of change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def assert_one_line(text: str) -> None:
    assert text.strip()
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1, text


def run(place: Path, argv: list[str]) -> int:
    """Run a command line; check that it ends well or with one line, and writes nothing."""
    before = tree(place)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(argv)
    assert code in (0, 2), (argv, err.getvalue())
    if code == 2:
        assert_one_line(err.getvalue())
        assert out.getvalue() == ""
    assert tree(place) == before
    return code


def read(source: Any) -> None:
    """Read a source in every way there is; only a DataError of one line may come of it."""
    for kind, load in (("prompts", load_prompts), ("preferences", load_preferences)):
        for bad in (False, True):
            data = DataSettings(train="unused", skip_bad_rows=bad, max_prompt_tokens=3, max_response_tokens=3)
            for attempt in (
                lambda kind=kind, bad=bad: check_source(source, kind, None, skip_bad_rows=bad),
                lambda load=load, data=data: load(source, TOKENIZER, data),
            ):
                try:
                    attempt()
                except DataError as error:
                    assert_one_line(" ".join(str(error).split()))


# Data

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
WORDS = st.sampled_from(["w1", "w1 w2", "w1 w2 w3 w4 w5", "", " ", "\n\nAssistant:", "<eos>", "\ud800"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"role": st.sampled_from(["user", "assistant", "system"]) | JSON, "content": WORDS | JSON, "name": JSON},
    ),
    max_size=3,
)
FIELDS = dict.fromkeys(("prompt", "chosen", "rejected"), WORDS | MESSAGES | JSON)
ROWS = st.lists(st.fixed_dictionaries({}, optional=FIELDS) | JSON, max_size=4)
PIECES = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\xff", b"\xef\xbb\xbf", b'"prompt"', b"PAR1", b"null"]
)
BYTES = st.binary(max_size=64) | st.lists(PIECES | st.binary(max_size=4), max_size=12).map(b"".join)


@pytest.mark.parametrize("suffix", quick_first([".jsonl", ".json", ".parquet"], 1))
@bounded(80)
@given(content=BYTES)
def test_any_bytes_as_a_file(place, suffix, content):
    path = place / f"data{suffix}"
    path.write_bytes(b"PAR1" + content + b"PAR1" if suffix == ".parquet" else content)
    before = tree(place)
    read(path)
    assert tree(place) == before


@pytest.mark.parametrize("suffix", quick_first([".jsonl", ".json", None], 1))
@bounded(80)
@given(rows=ROWS)
def test_any_rows(place, suffix, rows):
    if suffix is None:
        read(rows)
        return
    path = place / f"data{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    read(path)


COLUMN = st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=2, max_size=2)
NUMBERS = st.lists(st.none() | st.integers(-9, 9), min_size=2, max_size=2)
CHATS = st.lists(
    st.lists(st.fixed_dictionaries({"role": st.none() | st.just("user"), "content": st.none() | st.just("w1")}), max_size=2),
    min_size=2,
    max_size=2,
)


@pytest.mark.long
@bounded(40)
@given(columns=st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "text"]), COLUMN | NUMBERS | CHATS))
def test_any_parquet(place, columns):
    path = place / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    read(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    read(path)


@pytest.mark.long
@bounded(20)
@given(name=st.text(max_size=20) | st.sampled_from(["~", "~nobody/x", ".", "..", "/", "a\0b", "x" * 300, "a.jsonl/b.jsonl"]))
def test_any_name_of_a_file(place, name):
    """A name of the form of a hub dataset is not looked at: that would need the hub."""
    if Path(name).suffix not in (".json", ".jsonl", ".parquet"):
        name += ".jsonl"
    run(place, ["ppo", *GOOD, f"--data.train={name}", "--dry-run"])


@pytest.mark.long
@pytest.mark.parametrize("command", ["ppo", "sft"])
@bounded(15)
@given(rows=ROWS)
def test_dry_run_of_any_rows(place, command, rows):
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(place, [command, *GOOD, "--data.train", "rows.jsonl", "--dry-run"])


# Settings

GOOD = ["--model.name_or_path", "model", "--data.train", "pairs.jsonl", "--run.output", "out"]
NAMES = sorted({name for config in CONFIGS.values() for name in settings_of(config)})
VALUES = st.sampled_from(
    ["1", "0", "-1", "1.5", "nan", "true", "null", "[]", "{}", "[{kind: head}]", "nf4", "model", "", "[", "!!x"]
)
YAML_VALUES = st.recursive(
    SCALARS | VALUES | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(VALUES | SCALARS, inner, max_size=2),
)
GROUPS = sorted({part for name in NAMES for part in name.split(".")})
TREES = st.recursive(
    st.dictionaries(st.sampled_from([*GROUPS, *NAMES]) | SCALARS, YAML_VALUES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from(GROUPS), inner | YAML_VALUES, max_size=3),
    max_leaves=6,
)
YAML_PIECES = st.sampled_from(
    [
        *"{}[]:,-?!&*#|>'\"%@`\n\t ",
        ": ",
        "\n  ",
        "- ",
        "&a ",
        "*a",
        "<<: ",
        "!!python/object:os.system ",
        "---\n",
        "steps",
        "kl",
    ]
    + ["coef", "kl.coef", "2024-13-45", "1:99", "0x", "1e5", ".inf", "yes", "~", "9" * 5000, "\x00", "\ufeff", "\u2028"]
)


def load(place: Path, command: str, content: bytes, *flags: str) -> None:
    """Load a file of settings as a command does that prints or checks them."""
    (place / "settings.yaml").write_bytes(content)
    before = tree(place)
    try:
        parse(CONFIGS[command], command, ["settings.yaml", *flags])
    except ConfigError as error:
        assert_one_line(" ".join(str(error).split()))
    assert tree(place) == before


@pytest.mark.parametrize("command", CONFIGS)
@bounded(40)
@given(
    content=st.binary(max_size=40)
    | st.lists(YAML_PIECES, max_size=12).map("".join).map(str.encode)
    | st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_text_as_settings(place, command, content):
    load(place, command, content, "--print-config")


@pytest.mark.long
@pytest.mark.parametrize("command", CONFIGS)
@bounded(40)
@given(tree=TREES)
def test_any_mapping_as_settings(place, command, tree):
    load(place, command, yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"), "--print-config")


@pytest.mark.long
@bounded(20)
@given(tree=TREES)
def test_dry_run_with_any_settings(place, tree):
    (place / "settings.yaml").write_bytes(yaml.safe_dump(tree).encode("utf-8", "surrogatepass"))
    run(place, ["ppo", "settings.yaml", *GOOD, "--dry-run"])


# Command lines

FLAGS = st.sampled_from([*(f"--{name}" for name in NAMES), "--reward.sources+", "--kl", "--modle.dtype", "--", "-", "-h", "-x"])
TOKENS = st.sampled_from([*OPTIONS, "pairs.jsonl", "model", "gone.yaml"]) | FLAGS | VALUES | st.text(max_size=6)
TOKENS |= st.builds("{}={}".format, FLAGS, VALUES)


@pytest.mark.parametrize("stop", quick_first(["--print-config", "--dry-run"], 1))
@bounded(40)
@given(tokens=st.lists(TOKENS, max_size=4), command=st.sampled_from(["ppo", "sft"]))
def test_any_command_line(place, stop, tokens, command):
    tokens = [token for token in tokens if token != "--traceback"]
    run(place, [command, stop, *GOOD, *tokens])


@pytest.mark.long
@bounded(40)
@given(
    command=st.sampled_from(["export", "inspect", "profile", "plan", "quickstart", "doctor", "pppo", ""]) | st.text(max_size=5),
    tokens=st.lists(
        st.sampled_from(["model", "gone", "--json", "--output", "--rank", "x", "--help", "-h"]) | st.text(max_size=4)
    ),
)
def test_any_other_command(place, command, tokens):
    """The last token is no option of any command, so that none of them starts to work."""
    if command not in ("ppo", "sft", *COMMANDS, "profile", "plan") or "-h" not in tokens:
        run(place, [command, *(token for token in tokens if token != "--traceback"), "--no-such-option"])
