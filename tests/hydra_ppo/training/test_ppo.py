"""PPO: batch-size independence, that it learns, and what stops it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hydra_ppo.compute.kv_cache import KVCache, new_cache
from hydra_ppo.config.settings import (
    KLSettings,
    MonitorSettings,
    OptimizerSettings,
    RewardSettings,
    RewardSource,
    RolloutSettings,
)
from hydra_ppo.errors import ConfigError, NonFiniteError
from hydra_ppo.rewards.server import Server
from hydra_ppo.rollout.collect import collect_experience
from hydra_ppo.runtime.interruption import StopRequested
from hydra_ppo.training.held_out import held_out_samples
from hydra_ppo.training.ppo import PPOTrainer
from hydra_ppo.training.ppo_advantages import with_advantages
from hydra_ppo.training.ppo_metrics import COMPARED, compare, repeated_ngrams
from hydra_ppo.training.ppo_update import Updates
from tests.families import randomise
from tests.hydra_ppo.training.test_joint_sft import Memo
from tests.training import count_low_tokens, hydra, ppo_config, prompts, tokenizer

LOW_WORDS = RewardSettings(isolation="thread", sources=[RewardSource("function", "tests.training:count_low_tokens")])
needs_layers = pytest.mark.skipif(not isinstance(new_cache(1), KVCache), reason="caches of this transformers have no layers")
METRICS = {
    "objective/scores",
    "objective/scores_std",
    "objective/rlhf_reward",
    "objective/kl",
    "objective/entropy",
    "policy/approx_kl",
    "policy/clip_frac",
    "policy/loss",
    "policy/grad_norm",
    "policy/ratio",
    "policy/entropy",
    "value/loss",
    "value/clip_frac",
    "value/explained_variance",
    "value/grad_norm",
    "rollout/response_length",
    "rollout/eos_rate",
    "kl_coef",
    "lr",
    "time/tokens_per_second",
    "time/responses_per_second",
}


def trainer(model=None, config=None, **options) -> PPOTrainer:
    config = config or ppo_config(reward=LOW_WORDS)
    return PPOTrainer(model or hydra(), tokenizer(), config, prompts(), **options)


def finished_experience(model, config):
    batch = collect_experience(
        model,
        [p.ids for p in prompts(8)],
        config.rollout,
        eos_ids=[2],
        pad_id=0,
        generator=torch.Generator().manual_seed(0),
    )
    return with_advantages(batch, torch.linspace(-1, 1, 8), config, 0.02)


@pytest.mark.parametrize(
    "changes", [{}, {"entropy_coef": 0.01}, {"microbatch_tokens": 20}, {"value_clip_range": None}], ids=str
)
def test_gradients_do_not_depend_on_the_microbatch_size(changes):
    found = []
    for size in (1, 3, 8):
        model = hydra()
        randomise(model)
        config = ppo_config(reward=LOW_WORDS, microbatch_size=size, minibatch_size=8, ppo_epochs=1, **changes)
        ppo = trainer(model, config)
        gradients = {}
        ppo.progress.optimizer.step = lambda gradients=gradients, model=model: gradients.update(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        metrics = ppo.update(finished_experience(model, config))
        found.append((gradients, metrics))
    for gradients, metrics in found[1:]:
        assert gradients.keys() == found[0][0].keys()
        for name, gradient in found[0][0].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
        assert metrics == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)


def test_the_first_update_starts_at_ratio_1():
    model = hydra()
    config = ppo_config(reward=LOW_WORDS, ppo_epochs=1, minibatch_size=8)
    metrics = trainer(model, config).update(finished_experience(model, config))
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["policy/clip_frac"] == 0


@pytest.mark.parametrize(
    "options", [{}, {"quantization": "nf4"}, {"trunk_layers": 1}, {"dtype": "bf16"}, {"dtype": "fp16"}], ids=str
)
def test_ppo_raises_the_reward_and_leaves_the_base_alone(options):
    model = hydra(**options)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    config = ppo_config(
        reward=LOW_WORDS,
        steps=25,
        rollout=RolloutSettings(batch_size=32, max_new_tokens=6, score_batch_size=32),
        minibatch_size=16,
        microbatch_size=16,
        optimizer=OptimizerSettings(learning_rate=1e-2),
        kl=KLSettings(coef=0.0),
    )
    memo = Memo()
    summary = trainer(model, config, eval_prompts=prompts(40)[16:], run=memo).train()
    assert summary["eval_scores_after"] > summary["eval_scores_before"] + 3 * summary["eval_scores_gain_se"]
    assert summary["eval_scores_after"] > 0.6  # a random policy gets about 8 / 28
    for name, value in frozen.items():
        assert torch.equal(value, dict(model.named_parameters())[name]), name
    assert memo.steps[0][0] == 0  # of before training
    assert memo.steps[0][1].keys() == {name for name in memo.steps[-1][1] if name.startswith("eval/")}
    assert memo.steps[1][1].keys() >= METRICS
    assert memo.steps[-1][0] == 25


def test_the_kl_penalty_holds_the_actor_back():
    kls = []
    for coef in (0.0, 1.0):
        config = ppo_config(
            reward=LOW_WORDS,
            steps=10,
            rollout=RolloutSettings(batch_size=16, max_new_tokens=6),
            minibatch_size=16,
            optimizer=OptimizerSettings(learning_rate=1e-2),
            kl=KLSettings(coef=coef),
        )
        kls.append(trainer(hydra(), config, eval_prompts=prompts(16)).train()["eval_kl"])
    assert kls[1] < 0.5 * kls[0]


def test_same_seed_same_run():
    runs = []
    for _ in range(2):
        memo = Memo()
        model = hydra()
        trainer(model, run=memo).train()
        timeless = [{k: v for k, v in m.items() if not k.startswith("time/")} for _, m in memo.steps]
        runs.append((timeless, [p.detach().clone() for p in model.parameters() if p.requires_grad]))
    assert repr(runs[0][0]) == repr(runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_early_stop_leaves_the_actor_and_goes_on_with_the_critic():
    model = hydra()
    config = ppo_config(reward=LOW_WORDS, target_kl=1e-12, ppo_epochs=3, optimizer=OptimizerSettings(learning_rate=1e-2))
    ppo = trainer(model, config)
    metrics = ppo.update(finished_experience(model, config))
    assert metrics["policy/stopped_early"] == 1.0
    assert metrics["value/loss"] is not None


def test_critic_warmup_leaves_the_actor_alone():
    model = hydra()
    ppo = trainer(model, ppo_config(reward=LOW_WORDS, critic_warmup_steps=2))
    before = [p.detach().clone() for p in ppo.updates.parameters["actor"]]
    critic = [p.detach().clone() for p in ppo.updates.parameters["critic"]]
    ppo.train()
    assert all(torch.equal(a, b) for a, b in zip(before, ppo.updates.parameters["actor"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(critic, ppo.updates.parameters["critic"], strict=True))


def test_adaptive_kl_moves_the_coefficient():
    ppo = trainer(config=ppo_config(reward=LOW_WORDS, kl=KLSettings(coef=0.1, adaptive=True, target=5.0, horizon=100)))
    ppo.step(1)
    # KL is about 0 at step 1, far below the target: the error is clipped to -0.2; 0.1 * (1 - 0.2 * 8 / 100)
    assert ppo.progress.kl_coef == pytest.approx(0.1 * (1 - 0.2 * 8 / 100))


def test_recomputed_logprobs_report_the_drift():
    rollout = RolloutSettings(batch_size=8, max_new_tokens=6, recompute_logprobs=True)
    metrics = trainer(config=ppo_config(reward=LOW_WORDS, rollout=rollout)).step(1)
    assert 0 <= metrics["rollout/logprob_drift"] < 1e-4
    assert trainer().step(1)["rollout/logprob_drift"] is None


def rollout_of(**changes) -> RolloutSettings:
    return RolloutSettings(batch_size=8, max_new_tokens=6, score_batch_size=3, **changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_cache": "int8"}, {"weights": "merged-bf16"}, {"measure_drift": True}, {"recompute_logprobs": True}],
    ids=str,
)
def test_metrics_of_drift_are_there_where_it_is_measured(changes):
    metrics = trainer(config=ppo_config(reward=LOW_WORDS, rollout=rollout_of(**changes))).step(1)
    names = {name for name in metrics if name.startswith(("rollout/drift", "rollout/recomputed", "rollout/importance"))}
    measured = {"rollout/drift", "rollout/drift_max"}
    if not changes:
        assert names == set()
    elif "recompute_logprobs" in changes:
        assert names == measured
        assert metrics["rollout/logprob_drift"] == metrics["rollout/drift_max"]
    else:
        assert names == measured | {"rollout/recomputed"}
        assert metrics["rollout/recomputed"] == 0.0
        assert metrics["rollout/logprob_drift"] is None
    if changes:
        assert 0 <= metrics["rollout/drift"] <= metrics["rollout/drift_max"] < 0.05
        assert (metrics["rollout/drift"] > 1e-5) == bool({"kv_cache", "weights"} & set(changes))


@needs_layers
def test_a_rollout_above_the_bound_says_so_and_its_tokens_are_weighed():
    config = ppo_config(reward=LOW_WORDS, rollout=rollout_of(kv_cache="int8", max_drift=1e-9, importance_cap=1.001))
    ppo = trainer(config=config)
    part = ppo._rollout(1)
    metrics, found = part.metrics, part.experience
    mask = found.response_mask
    weights = (found.old_logprobs - found.sampler_logprobs).exp().clamp(max=1.001)[mask]
    assert metrics["rollout/recomputed"] == 1.0
    assert metrics["rollout/importance_weight"] == pytest.approx(weights.mean().item(), rel=1e-6)
    share = (weights >= 1.001).float().mean().item()
    assert metrics["rollout/importance_truncated"] == pytest.approx(share, abs=1e-6)
    assert 0 < share < 1


def test_the_actors_gradient_is_that_of_the_weighed_loss():
    """Every token's weight 3 gives three times the gradient; without recomputed log-probs there is nothing to weigh."""
    gradients = {}
    for name, cap, shift in (("plain", None, None), ("weighed", 3.0, 5.0), ("not recomputed", 3.0, None)):
        model = hydra()
        randomise(model)
        config = ppo_config(reward=LOW_WORDS, rollout=rollout_of(importance_cap=cap, recompute_logprobs=cap is not None))
        ppo = trainer(model, config)
        rows = finished_experience(model, replace(config, rollout=rollout_of()))
        if shift is not None:
            rows = replace(rows, sampler_logprobs=rows.old_logprobs - shift)  # weights of e^5, capped
        ppo.updates.actor_backward(rows, rows.response_mask.sum())
        gradients[name] = torch.cat([p.grad.flatten() for p in ppo.updates.parameters["actor"]])
    torch.testing.assert_close(gradients["weighed"], 3 * gradients["plain"])
    assert torch.equal(gradients["not recomputed"], gradients["plain"])
    assert gradients["plain"].abs().max() > 0


@needs_layers
def test_an_int8_run_repeats_itself_bit_for_bit():
    config = ppo_config(reward=LOW_WORDS, rollout=rollout_of(kv_cache="int8", max_drift=1e-9, importance_cap=2.0))
    runs = []
    for _ in range(2):
        model = hydra()
        trainer(model, config, run=Memo()).train()
        runs.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_learning_rate_follows_its_schedule_over_all_optimizer_steps():
    config = ppo_config(
        reward=LOW_WORDS, optimizer=OptimizerSettings(learning_rate=1e-3, schedule="linear", warmup_fraction=0.25)
    )
    memo = Memo()
    trainer(config=config, run=memo).train()
    # 2 steps x 2 epochs x 2 minibatches = 8 optimizer steps, 2 of warm-up; after 4: 1e-3 * (8 - 4) / (8 - 2); after 8: 0
    assert memo.steps[0][1]["lr"] == pytest.approx(1e-3 * 4 / 6)
    assert memo.steps[1][1]["lr"] == pytest.approx(0)


def test_non_finite_weights_stop_the_run_with_step_phase_and_quantity():
    model = hydra()
    ppo = trainer(model)
    with torch.no_grad():
        model.heads["value"].weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"step=1 phase=rollout: value/mean is nan"):
        ppo.step(1)


def test_an_untrained_reward_head_is_refused():
    with pytest.raises(ConfigError, match="names the reward head, but this model's was never trained; run hydra-ppo sft"):
        trainer(config=ppo_config())


def test_no_prompts_and_wrong_stage_are_refused():
    with pytest.raises(ConfigError, match="holds no prompt"):
        PPOTrainer(hydra(), tokenizer(), ppo_config(reward=LOW_WORDS), [])
    with pytest.raises(ConfigError, match="is at stage 'sft', PPO needs 'ppo'"):
        trainer(hydra("sft"))


def test_samples_checkpoints_and_evaluation_come_when_asked():
    saved, memo = [], Memo()
    memo.samples = lambda step, rows: saved.append(("samples", step, len(rows), sorted(rows[0])))
    config = ppo_config(reward=LOW_WORDS, steps=4, sample_every=2, eval_every=2)
    config = replace(config, run=replace(config.run, save_every=3))
    trainer(config=config, run=memo, eval_prompts=prompts(4), save=lambda score: saved.append(("save", score is None))).train()
    keys = ["prompt", "response", "rewards", "score"]
    # The first evaluation is the best so far; step 3 is due; step 4 is the last.
    best, due, last = ("save", False), ("save", True), ("save", False)
    held_out = [one for one in saved if one[0] == "samples" and "held_out" in one[3]]
    assert [one[1:3] for one in held_out] == [(0, 4), (2, 4), (4, 4)]
    assert [one for one in saved if one not in held_out] == [
        *(("samples", 1, 4, keys), ("samples", 2, 4, keys), best, due, ("samples", 4, 4, keys), last),
    ]
    assert ["eval/scores" in m for _, m in memo.steps] == [True, False, True, False, True]


def parts(prompts, responses, messages, columns, ended):
    """A reward of two parts that reads all there is."""
    assert [given[-1] for given in messages] == [{"role": "assistant", "content": text} for text in responses]
    right = [float(done == row["done"]) for done, row in zip(ended, columns, strict=True)]
    return {"low": count_low_tokens(prompts, responses), "right": right}


def test_every_reward_source_is_logged_by_itself():
    """In metrics, samples and held-out metrics, parts of one too, and what has no weight."""
    sources = [
        RewardSource("function", "tests.training:count_low_tokens", 0.0),
        RewardSource("function", "tests.hydra_ppo.training.test_ppo:parts", 2.0, name="both"),
    ]
    memo, rows = Memo(), []
    memo.samples = lambda step, found: rows.extend(row for row in found if "held_out" not in row)
    config = ppo_config(reward=RewardSettings(isolation="thread", sources=sources), steps=1, minibatch_size=8)
    given = [replace(row, messages=[{"role": "user", "content": row.text}], columns={"done": True}) for row in prompts()]
    PPOTrainer(hydra(), tokenizer(), config, given[:12], given[12:], run=memo).train()
    (_, metrics), names = memo.steps[1], ["both", "both/low", "both/right", "count_low_tokens"]
    found = [f"{where}reward/{name}" for name in names for where in ("", "eval/")]
    assert sorted(name for name in metrics if "reward/" in name) == sorted([*found, "reward/length_r2"])
    assert [sorted(row["rewards"]) for row in rows] == [names] * 8
    for name in names:
        mean = sum(row["rewards"][name] for row in rows) / 8
        assert metrics[f"reward/{name}"] == pytest.approx(mean)
    for row in rows:
        found = row["rewards"]
        assert found["both"] == pytest.approx(found["both/low"] + found["both/right"])
        assert found["both/low"] == found["count_low_tokens"]
        assert row["score"] == pytest.approx(2 * found["both"])
    assert metrics["reward/both/right"] == metrics["rollout/eos_rate"]
    assert metrics["eval/reward/both/right"] == metrics["eval/eos_rate"]
    assert metrics["eval/scores"] == pytest.approx(2 * metrics["eval/reward/both"])


def test_prompts_without_the_column_that_a_reward_wants_are_refused():
    source = RewardSource("function", "tests.hydra_ppo.training.test_ppo:parts")
    wants = RewardSource("function", "tests.hydra_ppo.training.test_ppo:gold")
    rows = [replace(row, columns={"answer": "w1"}) for row in prompts()]
    config = ppo_config(reward=RewardSettings(isolation="thread", sources=[source, wants]))
    PPOTrainer(hydra(), tokenizer(), config, rows)
    for train, held_out in ((prompts(), rows), (rows, prompts())):
        with pytest.raises(ConfigError, match=r"takes 'answer', which is none of .* and the data has no other columns"):
            PPOTrainer(hydra(), tokenizer(), config, train, held_out)


def gold(prompts, responses, answer):
    return [float(text == right) for text, right in zip(responses, answer, strict=True)]


def test_a_server_is_given_what_the_tokens_spell(monkeypatch):
    """The query of OpenRLHF holds begin and end, special tokens shown."""
    seen = []
    monkeypatch.setattr(Server, "__call__", lambda self, given: seen.append(given) or [0.0] * len(given))
    sources = [RewardSource("http", "http://localhost:1")]
    rollout = RolloutSettings(batch_size=8, max_new_tokens=20)
    config = ppo_config(reward=RewardSettings(isolation="thread", sources=sources), rollout=rollout, steps=1)
    PPOTrainer(hydra(), tokenizer(), config, [replace(row, ids=(1, *row.ids)) for row in prompts()]).step(1)
    (given,) = seen
    for query, prompt, text, ended in zip(given.queries, given.prompts, given.texts, given.ended, strict=True):
        first, *words = query.split()
        assert (first, words[-1] == "<eos>") == ("<bos>", ended)
        assert [word for word in words if word.startswith("w")] == [*prompt.split(), *text.split()]  # specials are hidden there
    assert {*given.ended} == {True, False}


def test_memory_is_measured_by_phase_and_null_where_it_is_not():
    memo = Memo()
    config = ppo_config(reward=LOW_WORDS, steps=3)
    summary = trainer(config=replace(config, run=replace(config.run, memory="auto")), run=memo).train()
    phases = ["rollout", "score", "update-actor", "update-critic", "optimizer"]
    for _, metrics in memo.steps[:2]:
        assert all(metrics[f"memory/{phase}_peak_bytes"] > 0 for phase in phases)
    assert not any(key.startswith("memory/") for key in memo.steps[2][1])
    assert summary["peak_bytes"] == max(summary["phase_peak_bytes"].values())
    assert trainer().train()["peak_bytes"] is None


def test_only_one_roles_graph_is_alive_at_a_time():
    """Updating both roles peaks no higher than the larger of the two alone, but for the other role's gradients."""
    from hydra_ppo.runtime.memory import LiveBytes

    model = hydra(num_hidden_layers=4)
    config = ppo_config(reward=LOW_WORDS, microbatch_size=8, minibatch_size=8, ppo_epochs=1)
    ppo = trainer(model, config)
    batch = finished_experience(model, config)
    count = batch.response_mask.sum()

    def peak(*passes):
        for parameter in model.parameters():
            parameter.grad = None
        with LiveBytes(model.parameters()) as live:
            for function in passes:
                function(batch, count)
        return live.peak

    gradients = sum(p.numel() * 4 for p in ppo.updates.parameters["actor"])
    together = peak(ppo.updates.actor_backward, ppo.updates.critic_backward)
    assert together <= max(peak(ppo.updates.actor_backward), peak(ppo.updates.critic_backward)) + gradients + 4096


def test_summary_compares_prompt_by_prompt():
    before = {"scores": [0.0, 1.0, 2.0], "eval/scores": 1.0, "eval/kl": 0.0, "eval/repeated_4grams": 0.1}
    after = {"scores": [1.0, 2.0, 6.0], "eval/scores": 3.0, "eval/kl": 4.0, "eval/repeated_4grams": 0.2}
    found = compare(before, after)
    assert found.keys() == compare({}, {}).keys() == set(COMPARED)
    # gains 1, 1, 4: mean 2, variance (1 + 1 + 4) / 2 = 3, standard error sqrt(3 / 3) = 1
    assert found["eval_scores_gain_se"] == pytest.approx(1.0)
    assert found["eval_kl"] == 4.0
    assert math.isclose(found["eval_scores_after"] - found["eval_scores_before"], 2.0)


def test_repeated_ngrams_by_hand():
    # 1 2 3 4 1 2 3 4: 4-grams 1234 2341 3412 4123 1234: one of five stood before; 5 6 7 has none
    assert repeated_ngrams([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7]], 4) == pytest.approx(1 / 5)
    assert repeated_ngrams([[1]], 4) == 0.0


def test_an_evaluation_is_logged_whatever_the_interval():
    memo = Memo()
    config = ppo_config(reward=LOW_WORDS, steps=4, eval_every=2)
    config = replace(config, run=replace(config.run, log_every=3), monitor=MonitorSettings(enabled=False))
    trainer(config=config, run=memo, eval_prompts=prompts(4)).train()
    assert [(step, "eval/scores" in m) for step, m in memo.steps] == [(0, True), (2, True), (3, False), (4, True)]


INT8_WEIGHED = {"kv_cache": "int8", "max_drift": 1e-9, "importance_cap": 1.001}


@pytest.mark.parametrize("rollout", [{}, pytest.param(INT8_WEIGHED, marks=needs_layers)], ids=["plain", "int8-weighed"])
@pytest.mark.parametrize("options", [{}, {"trunk_layers": 1}], ids=str)
def test_a_step_that_was_stopped_between_its_minibatches_goes_on_from_its_state(options, rollout, monkeypatch):
    """The trunk of the rollout is not saved; the same pass gives it again. What the sampler had is saved where it is used."""
    config = ppo_config(reward=LOW_WORDS, rollout=rollout_of(**rollout))
    whole = hydra(**options)
    trainer(whole, config, run=Memo()).train()

    model = hydra(**options)
    stopped = trainer(model, config, run=Memo())
    real, minibatches = Updates.optimizer_step, []

    def stop_at_the_third(self, roles):
        minibatches.append(1)
        if len(minibatches) == 3:
            raise StopRequested
        return real(self, roles)

    with monkeypatch.context() as patch:
        patch.setattr(Updates, "optimizer_step", stop_at_the_third)
        with pytest.raises(StopRequested):
            stopped.train()
    assert stopped.position == (0, 2)
    assert stopped.sampled == 1
    state = stopped.state()
    assert not any("trunk" in name for name in state.tensors)
    assert ("experience.sampler_logprobs" in state.tensors) == bool(rollout)

    again = trainer(model, config, run=Memo())
    again.load(state)
    assert again.position == (0, 2)
    again.train()
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("order", ["together", "in-turn"])
def test_the_largest_ratio_is_that_of_any_token(order):
    """One optimizer step on some rows, then the ratios of the others, token by token."""
    model = hydra()
    config = ppo_config(
        reward=LOW_WORDS, ppo_epochs=1, minibatch_size=4, optimizer=OptimizerSettings(learning_rate=2e-2), update_order=order
    )
    ppo = trainer(model, config)
    rows = finished_experience(model, config)
    seen = []
    real = Updates.actor_backward

    def watched(self, micro, *arguments, **options):
        with torch.no_grad(), model.role("actor"):
            found = model.logprobs(micro.sequences(), 1.0).logprobs
        seen.append((found - micro.old_logprobs)[micro.response_mask].exp().max().item())
        return real(self, micro, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updates, "actor_backward", watched)
        metrics = ppo.update(rows)
    assert len(seen) == 4  # two minibatches of two micro-batches
    assert metrics["policy/ratio_max"] == pytest.approx(max(seen), rel=1e-5)
    assert metrics["policy/ratio_max"] > 1.05 > max(seen[:2])  # before the first step all are 1
    assert metrics["policy/clip_frac_max"] >= metrics["policy/clip_frac"]


def test_held_out_answers_are_kept_without_evaluators_too():
    found = {"responses": ["a", "b", "c"], "scores": [1.0, 2.0, 3.0]}
    assert held_out_samples(found, ["p", "q", "r"], most=2) == [
        {"held_out": True, "prompt": "p", "response": "a", "score": 1.0},
        {"held_out": True, "prompt": "q", "response": "b", "score": 2.0},
    ]
    judged = found | {"independent": [0.1, 0.2, 0.3], "independent_parts": {"gold": [0.5, 0.6, 0.7]}}
    assert held_out_samples(judged, ["p", "q", "r"], most=1) == [
        {"held_out": True, "prompt": "p", "response": "a", "score": 1.0, "independent": 0.1, "judges": {"gold": 0.5}},
    ]
    assert held_out_samples({}, [], most=2) == []
