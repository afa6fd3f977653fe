"""The benchmarks compare what is equal, and the table says what they measured. No timing is asserted."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console

from hydra_ppo.errors import DataError
from hydra_ppo.profiling.benchmarks import bench_logprobs, bench_ppo, bench_roles, linear_cost, measure, peak_bytes, table

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


# -- linear cost ---------------------------------------------------------------------------------------------------------

TINY = linear_cost.Sizes(
    hidden=16, intermediate=24, layers=1, heads=2, kv_heads=1, rank=2, tokens=32, pass_tokens=16, decoded=2
)


def cell(length: int, vocabulary: int, microseconds: float, attention: float, per_token: float) -> linear_cost.Cell:
    phases = linear_cost.PHASES
    return linear_cost.Cell(
        length,
        vocabulary,
        dict.fromkeys(phases, microseconds),
        dict.fromkeys(phases, attention),
        dict.fromkeys(phases, 1000),
        dict.fromkeys(phases, per_token),
        static_bytes=5,
        disturbed=0,
    )


CELLS = [cell(4, 50, 10.0, 2.0, 90.0), cell(8, 50, 14.0, 5.0, 100.0), cell(4, 99, 30.0, 0.0, 108.0)]


def test_clock_by_hand(monkeypatch):
    now = iter([0.0, 3.0, 5.0, 6.0, 7.5, 8.0, 9.0])
    monkeypatch.setattr(linear_cost.time, "perf_counter", lambda: next(now))
    clock = linear_cost.Clock()
    clock("rollout")  # at 0
    clock("score")  # 3
    clock("update-actor")  # 5
    with clock.paying_attention():  # 6 to 7.5
        pass
    clock("optimizer")  # 8
    clock("end")  # 9
    assert clock.seconds == {"rollout": 3.0, "score": 2.0, "update": 4.0}
    assert clock.attention == {"rollout": 0.0, "score": 0.0, "update": 1.5}


def test_timed_attention_changes_no_number():
    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention
    inputs = [torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, 2, 5, 4)

    def run() -> list[torch.Tensor]:
        output = functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3)
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

    expected = run()
    clock = linear_cost.Clock()
    clock("update-actor")
    with linear_cost.timed_attention(clock):
        assert functional.scaled_dot_product_attention is not plain
        found = run()
        forward_and_backward = clock.attention["update"]
        with torch.no_grad():
            torch.testing.assert_close(functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3), found[0])
    assert 0 < forward_and_backward < clock.attention["update"]
    assert functional.scaled_dot_product_attention is plain
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_attention_is_itself_again_after_an_error():
    plain = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), linear_cost.timed_attention(linear_cost.Clock()):
        raise ZeroDivisionError
    assert torch.nn.functional.scaled_dot_product_attention is plain


def test_a_cell_by_hand():
    model = linear_cost.make_model(50, 8, TINY)
    subject = linear_cost.Subject(model, 8, TINY)
    clocks = [linear_cost.Clock() for _ in range(3)]
    for clock, seconds in zip(clocks, (0.0032, 0.0064, 0.32), strict=True):
        clock.seconds = dict.fromkeys(linear_cost.PHASES, seconds)
        clock.attention = dict.fromkeys(linear_cost.PHASES, seconds / 4)
    found = subject.cell(clocks, {"rollout": 36, "score": 180, "update": 360}, 7, disturbed=1)
    assert found.microseconds_per_token["update"] == pytest.approx(200)  # 6.4 ms for 32 tokens
    assert found.without_attention("score") == pytest.approx(150)
    # Prompts of 1 token: 2 x 9 tokens are decoded together, and 2 rows of 8 + 1 make a pass.
    assert found.peak_bytes_per_token == {"rollout": 2.0, "score": 10.0, "update": 20.0}


def test_only_the_rows_get_longer():
    """Steps, passes and optimizer steps handle the same number of response tokens at every length."""
    model = linear_cost.make_model(50, 8, TINY)
    counted = []
    for length in (4, 8):
        subject = linear_cost.Subject(model, length, TINY)
        steps: list[str] = []
        announce = subject.trainer.on_phase
        subject.trainer.on_phase = lambda phase, steps=steps, announce=announce: (steps.append(phase), announce(phase))
        clock = subject.time()
        counted.append({phase: steps.count(phase) for phase in steps})
        assert all(clock.seconds[phase] > clock.attention[phase] > 0 for phase in linear_cost.PHASES)
        settings = subject.trainer.config
        assert settings.rollout.batch_size * length == TINY.tokens
        assert settings.rollout.score_batch_size * length == settings.microbatch_size * length == TINY.pass_tokens
    assert counted[0] == counted[1] == {"rollout": 1, "score": 1, "update-actor": 2, "update-critic": 2, "optimizer": 2}


def test_static_bytes_and_peaks():
    model = linear_cost.make_model(50, 8, TINY)
    subject = linear_cost.Subject(model, 8, TINY)
    peaks, static = subject.weigh()
    moments = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = 4 * (sum(p.numel() for p in model.parameters()) + moments)
    assert held <= static < 1.05 * held + 1000  # buffers and step counts besides
    # More than the input and output of each linear layer of a pass, 18 tokens of 16 and 24 numbers.
    assert peaks["update"] > 18 * 4 * (4 * 16 + 3 * 24)
    assert all(peaks[phase] > 0 for phase in linear_cost.PHASES)


def test_spreads_by_hand():
    assert linear_cost.spread([10.0, 8.0, 9.0]) == pytest.approx(0.25)
    found = linear_cost.spreads(CELLS)
    assert found["update time, vocabulary 50"] == pytest.approx(0.4)  # 14 over 10
    assert found["update time without attention, vocabulary 50"] == pytest.approx(0.125)  # 9 over 8
    assert found["score time, vocabulary 99"] == 0.0
    assert found["update peak"] == pytest.approx(0.2)  # 108 over 90, across vocabularies
    assert "rollout peak" not in found


def test_linear_table_and_picture():
    shown, verdicts = linear_cost.tables(CELLS, "")
    cells = [list(column.cells) for column in shown.columns]
    assert cells[:3] == [["50", "50", "99"], ["4", "8", "4"], ["10 (8)", "14 (9)", "30 (30)"]]
    names, *rest = (list(column.cells) for column in verdicts.columns)
    found = dict(zip(names, zip(*rest, strict=True), strict=True))
    assert found["update time, vocabulary 50"] == ("+40%", "")
    assert found["update time without attention, vocabulary 50"] == ("+12%", "flat")
    panels = linear_cost.figure(CELLS).axes
    assert [axes.get_title(loc="left") for axes in panels[:3]] == list(linear_cost.PHASES)
    total, rest, *_ = panels[0].get_lines()
    assert (list(total.get_ydata()), list(rest.get_ydata())) == ([10.0, 14.0], [8.0, 9.0])
    assert list(panels[3].get_lines()[0].get_ydata()) == [90.0 / 1024, 100.0 / 1024]


def shrunk(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda lengths, vocabularies, rounds, sizes, say: call(lengths, vocabularies, rounds, TINY, say)


def test_linear_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(linear_cost, "measure", shrunk(linear_cost.measure))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    output = tmp_path / "new" / "linear.json"
    arguments = ["--lengths", "4", "8", "--vocabularies", "50", "--rounds", "1", "--output", str(output)]
    assert linear_cost.main(arguments) == 0
    found = json.loads(output.read_text())
    assert [(c["response_tokens"], c["vocabulary"]) for c in found["cells"]] == [(4, 50), (8, 50)]
    assert found["spreads"].keys() == linear_cost.spreads(CELLS[:2]).keys()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "vocabulary 50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "rounds=0 must be at least 1"),
        (["--lengths", "100"], "length=100 does not cut 4096 tokens into passes of 1024"),
    ],
)
def test_linear_bad_input(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert linear_cost.main([*arguments, "--output", str(tmp_path / "out.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
