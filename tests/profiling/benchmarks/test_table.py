"""The table says what the benchmarks measured, and refuses what they did not write."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from hydra_ppo.errors import DataError
from hydra_ppo.profiling.benchmarks import table


def bench_json() -> dict[str, Any]:
    """Return what pytest-benchmark writes, as far as the table reads it."""
    shared = {"threads": 1, "torch": "2.13.0+cpu"}
    return {
        "machine_info": {"cpu": {"brand_raw": "Some CPU", "count": 2}, "system": "Linux", "python_version": "3.11.7"},
        "commit_info": {"id": "abc", "dirty": True},
        "datetime": "2026-01-01T00:00:00+00:00",
        "benchmarks": [
            {
                "name": "test_pair",
                "stats": {"rounds": 7, "median": 99.0},
                "extra_info": {
                    "title": "a pair",
                    "baseline": "slow",
                    "seconds": {"fast": 0.5, "slow": 2.0},
                    "peak_bytes": {"fast": 2**20, "slow": 8 * 2**20},
                    "tokens_per_second": {"fast": 2000.0, "slow": 500.0},
                    **shared,
                },
            },
            {
                "name": "test_alone",
                "stats": {"rounds": 3},
                "extra_info": {"title": "alone", "baseline": None, "seconds": {"it": 0.001}, **shared},
            },
        ],
    }


def test_rows_by_hand(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "bench.json").write_text(json.dumps(bench_json()))
    output = tmp_path / "new" / "out.json"
    assert table.main([str(tmp_path / "bench.json"), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    rows = found.pop("rows")
    assert found == {
        "format": 1,
        "measured": "2026-01-01T00:00:00+00:00",
        "commit": "abc+",
        "machine": {
            "cpu": "Some CPU",
            "cores": 2,
            "threads": 1,
            "system": "Linux",
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
        },
    }
    fast, slow, alone = rows
    assert fast == {
        "title": "a pair",
        "call": "fast",
        "seconds": 0.5,
        "rounds": 7,
        "peak_bytes": 2**20,
        "tokens_per_second": 2000.0,
        "baseline": "slow",
        "seconds_ratio": 0.5 / 2.0,
        "peak_ratio": 1 / 8,
    }
    assert (slow["seconds_ratio"], slow["peak_ratio"]) == (1.0, 1.0)
    assert (alone["seconds_ratio"], alone["peak_bytes"], alone["tokens_per_second"]) == (None, None, None)
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["a pair", "fast", "500.00", "0.25", "1.0", "0.12", "2,000"] in lines
    assert ["", "slow *", "2,000.00", "1.00", "8.0", "1.00", "500"] in lines
    assert ["alone", "it", "1.00", "-", "-", "-", "-"] in lines


def test_names_are_not_read_as_markup(tmp_path):
    data = bench_json()
    data["benchmarks"][1]["extra_info"]["title"] = "[red]alone[/red]"
    (tmp_path / "bench.json").write_text(json.dumps(data))
    out = io.StringIO()
    Console(width=120, file=out).print(table.draw(table.read(tmp_path / "bench.json")))
    assert "[red]alone[/red]" in out.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "not written by the benchmarks"),
        (json.dumps(bench_json() | {"benchmarks": []}), "benchmarks=[] holds nothing"),
        (json.dumps(bench_json() | {"benchmarks": [{"stats": {}, "extra_info": {}}]}), "not written by the benchmarks"),
    ],
)
def test_what_is_not_such_a_file(tmp_path, capsys, content, says):
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match="run pytest profiling/benchmarks"):
        table.read(path)
    assert table.main([str(path), "--output", str(tmp_path / "out.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
