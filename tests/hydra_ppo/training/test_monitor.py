"""Alarms over histories by hand: what raises each, what does not, and that a history survives being saved."""

from __future__ import annotations

import json
import random

import pytest

from hydra_ppo.config.monitor import ALARMS, MonitorSettings
from hydra_ppo.errors import ConfigError
from hydra_ppo.training.monitor import Watch
from hydra_ppo.training.over_optimisation import Evaluation, find_sign

SETTINGS = MonitorSettings(window=4)


def raised(settings: MonitorSettings, records: list[dict], rows: int = 16) -> list[tuple[int, str]]:
    watch = Watch()
    for step, record in enumerate(records, 1):
        watch.look(settings, step, record, {}, rows)
    return [(entry["step"], entry["name"]) for entry in watch.raised]


def test_length_needs_a_whole_window_and_is_corrected_for_few_responses():
    records = [{"reward/length_r2": 0.5}] * 6
    assert raised(SETTINGS, records) == [(4, "length")]
    assert raised(SETTINGS, [{"reward/length_r2": 0.32}] * 6) == []  # 1 - 0.68 * 15 / 14 = 0.271 with 16 responses
    assert raised(SETTINGS, [{"reward/length_r2": 0.32}] * 6, rows=1000) == [(4, "length")]
    assert raised(SETTINGS, [{"reward/length_r2": None}] * 9) == []
    assert raised(MonitorSettings(window=4, length_r2=None), records) == []


def test_kl_beyond_its_budget():
    records = [{"objective/kl": kl} for kl in (1.0, 9.0, 11.0, 12.0)]
    assert raised(MonitorSettings(kl_budget=10.0), records) == [(3, "kl")]
    assert raised(MonitorSettings(), records) == []


def test_entropy_below_a_share_of_its_first_value():
    """1, then 0.1 four times: the mean of the window goes 0.775 / 4 ... 0.325, then 0.1 below 0.2."""
    records = [{"policy/entropy": value} for value in (1.0, 0.1, 0.1, 0.1, 0.1, 0.1)]
    assert raised(SETTINGS, records) == [(5, "entropy")]
    assert raised(MonitorSettings(window=4, entropy_share=0.05), records) == []


def test_explained_variance_by_its_median():
    values = (0.5, -90.0, 0.4, 0.3, -0.1, -0.2, -0.3)
    # windows of four: medians 0.35, 0.1, 0.1, -0.15
    assert raised(SETTINGS, [{"value/explained_variance": value} for value in values]) == [(7, "explained_variance")]


def test_ratio_spikes_and_clipping():
    fine = {"policy/ratio_max": 3.0, "policy/clip_frac_max": 0.2}
    assert raised(SETTINGS, [fine, fine | {"policy/ratio_max": 50.0}]) == [(2, "ratio")]
    assert raised(SETTINGS, [fine, fine | {"policy/clip_frac_max": 0.6}]) == [(2, "ratio")]
    assert raised(SETTINGS, [{"policy/ratio_max": None}]) == []  # the actor sat out


def test_spread_that_rises():
    assert raised(SETTINGS, [{"reward/head/spread": value} for value in (0.1, 0.2, 0.3, 0.4)]) == [(4, "spread")]  # p = 1 / 24
    assert raised(SETTINGS, [{"reward/head/spread": value} for value in (0.2, 0.1, 0.3, 0.4)]) == []  # p = 4 / 24


def test_an_alarm_comes_again_only_after_a_window_without_it():
    def spikes(*steps):
        return [{"policy/ratio_max": 50.0 if step in steps else 1.0} for step in range(1, 20)]

    assert raised(SETTINGS, spikes(2, 3, 7, 11)) == [(2, "ratio")]  # never off for more than four steps
    assert raised(SETTINGS, spikes(2, 7)) == [(2, "ratio"), (7, "ratio")]


def test_a_monitor_that_is_off_remembers_nothing():
    watch = Watch()
    assert watch.look(MonitorSettings(enabled=False), 1, {"policy/ratio_max": 99.0}, {}, 8) == []
    assert watch == Watch()


def test_each_line_says_what_to_do_in_one_line():
    watch = Watch()
    record = {"policy/ratio_max": 99.0, "objective/kl": 99.0, "reward/length_r2": 0.9, "value/explained_variance": -1.0}
    settings = MonitorSettings(window=4, kl_budget=1.0)
    alarms = [
        alarm
        for step in range(1, 6)
        for alarm in watch.look(settings, step, record | {"policy/entropy": 1.0 / step**3, "reward/head/spread": step}, {}, 64)
    ]
    assert {alarm.name for alarm in alarms} == {*ALARMS} - {"over_optimisation"}
    assert all("\n" not in alarm.line and (";" in alarm.line or ": " in alarm.line) for alarm in alarms)


# -- score and evaluator ---------------------------------------------------------------------------------------------


def evaluations(proxy, independent, rows=100, noise=0.2, seed=0) -> list[Evaluation]:
    """Evaluations with these means, and answers that vary about them."""
    rng = random.Random(seed)
    return [
        Evaluation(2 * i, [p + rng.gauss(0, noise) for _ in range(rows)], [g + rng.gauss(0, noise) for _ in range(rows)])
        for i, (p, g) in enumerate(zip(proxy, independent, strict=True))
    ]


def first_alarm(found: list[Evaluation], settings: MonitorSettings | None = None) -> tuple[int, str] | None:
    """Return number and kind of the first sign."""
    watch, settings = Watch(), settings or MonitorSettings()
    for number, one in enumerate(found):
        alarms = watch.look(settings, one.step, {}, {"scores": one.proxy, "independent": one.independent}, 64)
        if alarms:
            return number, next(kind for kind in ("fall", "lag", "trend") if f"({kind}" in alarms[0].line)
    return None


def alarms_of(proxy, independent, runs=20) -> int:
    """Return in how many of some runs an alarm is raised."""
    return sum(first_alarm(evaluations(proxy, independent, seed=seed)) is not None for seed in range(runs))


def test_both_rise_and_nothing_is_said():
    together = [0.1 * i for i in range(20)]
    assert alarms_of(together, together) == 0


@pytest.mark.parametrize(
    "values", [[1.0] * 20, [1 - 0.7**i for i in range(20)], [0.01 * i for i in range(20)]], ids=["flat", "saturating", "slow"]
)
def test_false_alarms_are_few(values):
    """Twenty looks each. A single look is wrong in one run of twenty; so would nearly every run be without a correction."""
    assert alarms_of(values, values) <= 3


def test_an_evaluator_that_turns_is_seen_before_it_has_lost_a_tenth():
    """A parabola with its top at 10: a tenth of the gain is lost at 10 + sqrt(0.1) * 10 = 13.2."""
    proxy, gold = [0.1 * i for i in range(20)], [1 - ((i - 10) / 10) ** 2 for i in range(20)]
    for seed in range(3):
        number, _ = first_alarm(evaluations(proxy, gold, seed=seed))
        assert 8 <= number <= 13


def test_an_evaluator_that_stops_while_the_score_goes_on():
    proxy, gold = [0.1 * i for i in range(20)], [min(0.1 * i, 1.0) for i in range(20)]
    number, kind = first_alarm(evaluations(proxy, gold))
    assert 11 <= number <= 16
    assert kind in ("lag", "trend")


def test_a_sudden_fall_is_seen_at_once_and_one_that_the_score_shows_is_not():
    gold = [0.0, 0.5, 1.0, 0.2]
    assert first_alarm(evaluations([0.0, 1.0, 2.0, 2.1], gold)) == (3, "fall")
    assert first_alarm(evaluations([0.0, 1.0, 2.0, 1.0], gold)) is None


def test_a_window_in_which_the_evaluators_trend_is_downward():
    """No fall is significant from one to the next, and nothing was gained before: the trend alone sees it."""
    rows = [0.0] * 50 + [1.0] * 50
    found = [Evaluation(i, [v + 0.05 * i for v in rows], [v - 0.004 * i for v in reversed(rows)]) for i in range(10)]
    noisy = [Evaluation(one.step, one.proxy, one.independent[one.step :] + one.independent[: one.step]) for one in found]
    sign = find_sign(noisy[0], noisy[0], 9, noisy, 10, 1, 0.05)
    assert sign.kind == "trend"
    assert sign.p == pytest.approx(10 / 3628800)  # one order of 10!, the tenth look
    assert find_sign(noisy[0], noisy[0], 9, noisy[:9], 10, 1, 0.05) is None  # no whole window


def test_a_history_that_was_saved_goes_on_as_if_it_had_not_been():
    settings = MonitorSettings(window=4)
    found = evaluations([0.1 * i for i in range(12)], [1 - ((i - 5) / 5) ** 2 for i in range(12)])
    whole, parts = Watch(), Watch()
    for step, one in enumerate(found):
        record = {"policy/entropy": 1.0 / (step + 1), "policy/ratio_max": 30.0 if step == 7 else 2.0}
        seen = {"scores": one.proxy, "independent": one.independent}
        expected = whole.look(settings, step, record, seen, 16)
        parts = Watch.load(json.loads(json.dumps(parts.save())))
        assert parts.look(settings, step, record, seen, 16) == expected
    assert parts == whole
    assert {entry["name"] for entry in whole.raised} == {"over_optimisation", "entropy", "ratio"}


def test_an_evaluation_that_is_not_kept_is_judged_and_forgotten():
    found = evaluations([0.0, 1.0, 2.0, 2.1], [0.0, 0.5, 1.0, 0.2])
    watch = Watch()
    for one in found[:3]:
        watch.look(SETTINGS, one.step, {}, {"scores": one.proxy, "independent": one.independent}, 64)
    before = watch.copy()
    last = {"scores": found[3].proxy, "independent": found[3].independent}
    assert [alarm.name for alarm in watch.look(SETTINGS, 6, {}, last, 64, keep=False)] == ["over_optimisation"]
    assert (watch.recent, watch.best, watch.tried, watch.flat) == (before.recent, before.best, before.tried, before.flat)
    assert before.raised == []  # a copy looks on by itself


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 3}, "window=3 is too short"),
        ({"significance": 0.5}, "significance=0.5 must lie in"),
        ({"length_r2": 1.0}, "length_r2=1.0 must lie in"),
        ({"kl_budget": 0.0}, "kl_budget=0.0 must be greater"),
        ({"explained_variance": 1.0}, "explained_variance=1.0 must be below 1"),
        ({"ratio_max": 1.0}, "ratio_max=1.0 must be above 1"),
        ({"enabled": False, "stop_on_alarm": True}, "stops at alarms that enabled=False never raises"),
        ({"stop_on_alarm": ["kl"]}, "stops at 'kl', which is switched off"),
        ({"stop_on_alarm": ["spread"], "spread": False}, "stops at 'spread', which is switched off"),
        ({"stop_on_alarm": ["ratio"], "ratio_max": None, "clip_share": None}, "stops at 'ratio'"),
    ],
)
def test_settings_that_make_no_sense(changes, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        MonitorSettings(**changes)


def test_which_alarms_stop():
    assert MonitorSettings(stop_on_alarm=True).stops_at("ratio")
    assert not MonitorSettings().stops_at("ratio")
    some = MonitorSettings(stop_on_alarm=["length"])
    assert (some.stops_at("length"), some.stops_at("ratio")) == (True, False)
