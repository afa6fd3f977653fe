"""The benchmarks compare what is equal, and the table says what they measured. No timing is asserted."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console

from hydra_ppo.errors import DataError
from hydra_ppo.profiling.benchmarks import bench_logprobs, bench_ppo, bench_roles, measure, peak_bytes, table

SMALL = bench_ppo.Sizes(hidden=16, layers=2, vocabulary=32, prompts=4, prompt_tokens=3, response_tokens=5, microbatch=2)


class Benchmark:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds = 0

    def pedantic(self, target, rounds: int) -> None:
        for _ in range(rounds):
            target()
            self.rounds += 1


def test_calls_take_turns():
    order: list[str] = []
    benchmark = Benchmark()
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    measure(benchmark, "two calls", calls, rounds=2, repeats=3, baseline="b", tokens=10)
    assert "".join(order) == "ab" + 2 * "aaabbb"  # once to warm up
    info = benchmark.extra_info
    assert info["tokens_per_second"] == {name: 10 / seconds for name, seconds in info["seconds"].items()}
    assert (info["title"], info["baseline"], info["torch"]) == ("two calls", "b", torch.__version__)
    assert "peak_bytes" not in info


def test_peak_leaves_out_what_was_alive():
    kept = torch.zeros(100)  # 400 bytes
    benchmark = Benchmark()
    # doubled (400 bytes) and its square (400) live at once
    measure(benchmark, "square", {"square": lambda: (kept * 2).square()}, rounds=1, alive=[kept])
    assert benchmark.extra_info["peak_bytes"] == {"square": 800}
    assert peak_bytes(lambda: kept.add_(1), [kept]) == 0
    assert peak_bytes(lambda: kept + 1, []) == 800  # not named as alive, so it counts


def test_logprobs_agree():
    inputs = bench_logprobs.make_inputs(count=7, width=8, vocabulary=11)
    bench_logprobs.check_agreement(inputs)
    # by hand: p = softmax(W h), d log p(a) / d h = W^T (e_a - p), times what arrives
    p = (inputs.hidden.detach() @ inputs.weight.T).softmax(dim=-1)
    logprobs, gradient = bench_logprobs.from_full_logits(inputs)
    expected = inputs.weight[inputs.tokens] - p @ inputs.weight
    torch.testing.assert_close(logprobs, p[torch.arange(7), inputs.tokens].log())
    torch.testing.assert_close(gradient, expected * inputs.upstream[:, None])


def test_full_logits_hold_three_tensors_of_the_vocabulary():
    inputs = bench_logprobs.make_inputs(count=8, width=4, vocabulary=1000)
    peak = peak_bytes(lambda: bench_logprobs.from_full_logits(inputs), inputs.tensors())
    assert peak // (8 * 1000 * 4) == 3


def test_a_disagreement_is_noticed(monkeypatch):
    inputs = bench_logprobs.make_inputs(count=7, width=8, vocabulary=11)
    logprobs, gradient = bench_logprobs.from_full_logits(inputs)
    monkeypatch.setattr(bench_logprobs, "from_hidden_states", lambda inputs: (logprobs, gradient + 0.01))
    with pytest.raises(AssertionError):
        bench_logprobs.check_agreement(inputs)


def test_roles_agree():
    model, twin = bench_roles.make_models(layers=2, rank=2)
    bench_roles.check_agreement(model, twin)
    bench_roles.by_role(model)
    bench_roles.by_set_adapter(twin)
    bench_roles.check_agreement(model, twin)
    assert model.current_role is None


def test_phases_agree():
    step = bench_ppo.Step(SMALL)
    bench_ppo.check_agreement(step)
    assert step.sample().responses == step.experience.responses()
    before = [p.detach().clone() for p in step.trainer.actor_parameters]
    step.update()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.trainer.actor_parameters, strict=True))
    # Nothing is left behind: a second update starts from the same bytes.
    alive = step.alive()
    step.update()
    assert len(step.alive()) == len(alive)


# -- the table -----------------------------------------------------------------------------------------------------------


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
