"""Losses of the reward model, several heads and floor pairs in joint SFT: by hand, one pass, and the same batches always."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hydra_ppo.data.rows import PreferenceRow
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.heads import HeadPlan, head_plan
from hydra_ppo.runtime.recorder import Silent
from hydra_ppo.training.joint_sft import JointSFTTrainer
from hydra_ppo.training.pairs import PairBatches, TrainingPair, heads_of_pair
from hydra_ppo.training.reward_losses import along_columns
from tests.families import randomise
from tests.training import hydra, llama, pairs, sft_config

CPU = torch.device("cpu")
CLOSE = 1e-5
LOSSES = {
    "five heads": {"reward_heads": 5},
    "divergent": {"reward_loss": "divergent", "reward_heads": 2},
    "margin": {"reward_loss": "margin"},
    "advantage": {"reward_loss": "advantage", "reward_heads": 2},
    "floor": {"floor_share": 0.25, "reward_heads": 2},
    "floor first": {"floor_steps": 1, "floor_kinds": ["random-tokens"]},
    "reward alone": {"sft_coef": 0.0, "reward_heads": 3, "reward_loss": "advantage"},
    "all of it": {"reward_loss": "divergent", "reward_heads": 3, "floor_share": 0.25, "floor_steps": 2},
}


def model_for(config, **changes):
    from hydra_ppo.model.hydra import HydraModel

    torch.manual_seed(0)
    model = HydraModel.from_config(llama(**changes), train=config.stage, heads=head_plan(config))
    randomise(model)
    return model


def rows_of(count: int = 16) -> list[PreferenceRow]:
    return [replace(row, margin=0.1 * (i % 5)) for i, row in enumerate(pairs(count))]


def trainer_for(config, model=None, rows=None, **options) -> JointSFTTrainer:
    model = model_for(config) if model is None else model
    return JointSFTTrainer(model, config, rows or rows_of(), rows_of(24)[16:], pad_token_id=0, **options)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


class Said:
    """What each head says after each token of a pair, by plain code: `chosen[t][head]`, `rejected[t][head]`; and e."""

    def __init__(self, model, row: PreferenceRow) -> None:
        self.before = len(row.prompt_ids)
        for side, prompt, answer in (
            ("chosen", row.prompt_ids, row.chosen_ids),
            ("rejected", row.before_rejected, row.rejected_ids),
        ):
            with torch.no_grad(), model.role("reward"):
                states = model.architecture.backbone(input_ids=torch.tensor([[*prompt, *answer]])).last_hidden_state[0]
            setattr(self, side, (states @ model.heads["reward"].weight.T).tolist())
            if model.expects and side == "chosen":
                self.expected = (states[self.before - 1] @ model.heads["expected"].weight[0]).item()


# -- losses against plain code


def loss_by_hand(config, model, row) -> tuple[float, float]:
    """Return the loss of a pair, averaged over the heads that learn from it, and that of its expected reward."""
    said = Said(model, row)
    learns = row.heads if isinstance(row, TrainingPair) and row.heads else [True] * config.reward_heads
    found = []
    for head in range(config.reward_heads):
        chosen, rejected = [v[head] for v in said.chosen], [v[head] for v in said.rejected]
        apart = chosen[-1] - rejected[-1]
        if config.reward_loss == "divergent":
            one, other = [*row.prompt_ids, *row.chosen_ids], [*row.before_rejected, *row.rejected_ids]
            first = next(i for i in range(100) if one[i : i + 1] != other[i : i + 1])
            differences = [
                chosen[min(t, len(one) - 1)] - rejected[min(t, len(other) - 1)] for t in range(first, max(len(one), len(other)))
            ]
            found.append(sum(softplus(-d) for d in differences) / len(differences))
        elif config.reward_loss == "margin":
            found.append(softplus(row.margin - apart))
        elif config.reward_loss == "advantage" and row.rejected_prompt_ids is None:
            m, e = config.advantage_bound, said.expected
            found.append(softplus(-apart) + softplus(chosen[-1] - e - m) + softplus(e - rejected[-1] - m))
        else:
            found.append(softplus(-apart))
    expected = 0.0
    if config.reward_loss == "advantage" and row.rejected_prompt_ids is None:
        means = [sum(side[-1]) / config.reward_heads for side in (said.chosen, said.rejected)]
        expected = (said.expected - sum(means) / 2) ** 2
    return sum(x for x, on in zip(found, learns, strict=True) if on) / sum(learns), expected


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_the_loss_of_a_batch_equals_plain_code(name, packing):
    config = sft_config(**LOSSES[name])
    model = model_for(config)
    model.packing = packing
    trainer = trainer_for(config, model)
    batch = next(trainer.batches.after(config.floor_steps))
    sums = trainer.pass_over(batch)
    each = [loss_by_hand(config, model, row) for row in batch]
    assert sums.ranking.item() == pytest.approx(sum(one for one, _ in each), rel=CLOSE)
    if config.reward_loss == "advantage":
        assert sums.expected.item() == pytest.approx(sum(e for _, e in each), rel=CLOSE)
    real = [row for row in batch if not row.floor]
    if config.sft_coef:
        plain = JointSFTTrainer(hydra_like(model), sft_config(reward_coef=0.0), rows_of(), pad_token_id=0)
        assert sums.nll.item() == pytest.approx(plain.pass_over(real).nll.item(), rel=CLOSE)  # a floor pair is not said again


def hydra_like(model):
    """Return the same base and adapter with one head."""
    other = model_for(sft_config())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if not name.startswith("heads."):
                parameter.copy_(dict(model.named_parameters())[name])
    return other


def pair_of(chosen, rejected, prompt=(5, 6), other=None) -> PreferenceRow:
    return PreferenceRow("", "", "", prompt, tuple(chosen), tuple(rejected), None if other is None else "", other)


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        # columns 0 and 1 are the prompt's
        (pair_of([7, 8, 2], [7, 9, 2]), [3, 4], [3, 4]),  # they part at the second token
        (pair_of([7, 2], [8, 9, 4, 2]), [2, 3, 3, 3], [2, 3, 4, 5]),  # the shorter stays at its end
        (pair_of([8, 9, 4, 2], [7, 2]), [2, 3, 4, 5], [2, 3, 3, 3]),
        (pair_of([7, 8, 9, 2], [7, 8]), [4, 5], [3, 3]),  # one is how the other begins: from where it ends
        (pair_of([7, 8], [7, 8, 9, 2]), [3, 3], [4, 5]),
        (pair_of([7, 2], [7, 2]), [3], [3]),  # equal: the last token
        (pair_of([7, 2], [7, 2], other=(5, 9, 9)), [1, 2, 3, 3], [1, 2, 3, 4]),  # the prompts part already
    ],
    ids=["middle", "shorter chosen", "shorter rejected", "prefix", "prefix chosen", "equal", "prompts"],
)
def test_where_answers_part(row, chosen, rejected):
    found = along_columns([row], CPU)
    assert found.counts.tolist() == [[True] * len(chosen)]
    assert found.read.tolist() == [chosen, rejected]


def test_where_answers_part_side_by_side():
    found = along_columns([pair_of([7, 8, 2], [7, 9, 2]), pair_of([7, 2], [8, 9, 4, 2])], CPU)
    assert found.counts.tolist() == [[True, True, False, False], [True] * 4]
    assert found.read.tolist() == [[3, 4, 4, 4], [2, 3, 3, 3], [3, 4, 4, 4], [2, 3, 4, 5]]


def test_advantages_of_two_prompts_are_ranked_and_no_more():
    config = sft_config(reward_loss="advantage")
    model = model_for(config)
    row = pair_of([7, 8, 2], [9, 2], other=(5, 9, 9))
    trainer = trainer_for(config, model)
    sums, said = trainer.pass_over([row]), Said(model, row)
    assert sums.ranking.item() == pytest.approx(softplus(said.rejected[-1][0] - said.chosen[-1][0]), rel=CLOSE)
    assert sums.expected.item() == 0.0
    assert loss_by_hand(config, model, row)[1] == 0.0


# -- one pass, whatever is read of it


@pytest.mark.parametrize("name", LOSSES)
def test_one_pass_a_micro_batch(name):
    config = sft_config(**LOSSES[name], microbatch_size=4)
    trainer = trainer_for(config)
    batch = next(trainer.batches.after(0))
    passes = []
    trainer.model.architecture.backbone.register_forward_hook(lambda *_: passes.append(1))
    trainer.step(0, batch)
    assert len(passes) == math.ceil(len(batch) / 4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_does_not_depend_on_the_microbatch_size(name):
    gradients = []
    for size in (1, 3, 8):
        config = sft_config(**LOSSES[name], microbatch_size=size)
        trainer = trainer_for(config)
        captured = {}
        trainer.optimizer.step = lambda captured=captured, model=trainer.model: captured.update(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        trainer.step(0, next(trainer.batches.after(0)))
        gradients.append(captured)
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for parameter, gradient in gradients[0].items():
            torch.testing.assert_close(other[parameter], gradient, rtol=1e-4, atol=1e-6)


# -- which heads learn from which pair


def test_heads_see_their_share_and_no_pair_is_lost():
    seen = torch.tensor([heads_of_pair(number, 5, 0.8, seed=0) for number in range(4000)]).float()
    # Standard error of a share: sqrt(0.8 * 0.2 / 4000) = 0.0063
    assert seen.mean(dim=0).tolist() == pytest.approx([0.8] * 5, abs=4 * 0.0063)
    # Draws of two heads are apart: both see 0.64 of the pairs.
    assert (seen[:, 0] * seen[:, 1]).mean().item() == pytest.approx(0.64, abs=4 * 0.0076)
    few = torch.tensor([heads_of_pair(number, 3, 0.01, seed=0) for number in range(300)])
    assert few.any(dim=1).all()
    assert few.any(dim=0).all()


def test_a_pair_is_of_the_same_heads_in_every_epoch_and_another_seed_draws_others():
    config = sft_config(reward_heads=4, epochs=3)
    by_row: dict[tuple, set] = {}
    for batch in PairBatches(rows_of(), config).after(0):
        for row in batch:
            by_row.setdefault((row.prompt_ids, row.chosen_ids), set()).add(row.heads)
    assert len(by_row) == 16
    assert all(len(heads) == 1 for heads in by_row.values())
    other = [heads_of_pair(n, 4, 0.8, 1) for n in range(16)]
    assert other != [heads_of_pair(n, 4, 0.8, 0) for n in range(16)]


def test_a_head_does_not_learn_from_a_pair_that_it_does_not_see():
    config = sft_config(reward_heads=3)
    trainer = trainer_for(config)
    row = TrainingPair(**{f: getattr(rows_of()[0], f) for f in PreferenceRow.__dataclass_fields__}, heads=(True, False, True))
    trainer.pass_over([row]).ranking.backward()
    moved = trainer.model.heads["reward"].weight.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [True, False, True]


def test_all_heads_learn_what_one_head_alone_learns():
    """With every pair for all and equal beginnings, each member is the one head: the loss is an average over heads."""
    one, several = sft_config(sft_coef=0.0), sft_config(sft_coef=0.0, reward_heads=3, head_share=1.0)
    found = []
    for config in (one, several):
        trainer = trainer_for(config)
        with torch.no_grad():
            trainer.model.heads["reward"].weight.copy_(torch.linspace(-1, 1, 64).expand(config.reward_heads, -1))
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(name.endswith("never"))
        trainer.pass_over(rows_of(8)).ranking.backward()
        found.append(trainer.model.heads["reward"].weight.grad)
    torch.testing.assert_close(found[1].sum(dim=0), found[0][0], rtol=1e-4, atol=1e-6)


# -- floor pairs


def test_batches_are_the_same_wherever_one_begins():
    config = sft_config(**LOSSES["all of it"], epochs=2)
    rows = rows_of()
    whole = list(PairBatches(rows, config).after(0))
    assert len(whole) == config.steps(16) == 2 + 2 * 3
    for done in range(len(whole) + 1):
        assert list(PairBatches(rows, config).after(done)) == whole[done:]


def test_floor_steps_and_shares():
    batches = list(PairBatches(rows_of(), sft_config(floor_share=0.25, floor_steps=2, epochs=1)).after(0))
    assert [sum(row.floor for row in batch) for batch in batches] == [8, 8, 2, 2, 1]
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 5]  # 16 = 6 + 6 + 4 of the data
    real = [row for batch in batches for row in batch if not row.floor]
    assert sorted(row.prompt_ids for row in real) == sorted(row.prompt_ids for row in rows_of())
    floor = [row for batch in batches for row in batch if row.floor]
    assert len({(row.prompt_ids, row.rejected_ids) for row in floor}) > 10


def test_without_floor_pairs_batches_are_those_of_before():
    config = sft_config(epochs=2)
    generator = torch.Generator().manual_seed(config.run.seed)
    rows = rows_of()
    expected = []
    for _ in range(2):
        order = torch.randperm(16, generator=generator).tolist()
        expected += [[rows[i].prompt_ids for i in order[start : start + 8]] for start in (0, 8)]
    assert [[row.prompt_ids for row in batch] for batch in PairBatches(rows, config).after(0)] == expected


def test_first_steps_train_the_heads_alone():
    config = sft_config(floor_steps=2, reward_heads=2)
    trainer = trainer_for(config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    batches = list(trainer.batches.after(0))
    for step, batch in enumerate(batches[:2]):
        found = trainer.step(step, batch)
        assert found["loss/sft"] is None
        assert found["train/reward_accuracy"] is None
        assert 0 <= found["train/floor_accuracy"] <= 1
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert changed == {"heads.reward.weight"}
    found = trainer.step(2, batches[2])
    assert found["loss/sft"] > 0
    assert found["train/floor_accuracy"] is None
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert any("lora_" in name for name in changed)


def test_floor_pairs_are_learned():
    kinds = ["shuffled", "truncated"]  # an answer to another prompt is as good here
    config = sft_config(floor_share=0.5, floor_kinds=kinds, reward_heads=3, epochs=20, sft_coef=0.0)
    trainer = trainer_for(config)
    metrics = [trainer.step(step, batch) for step, batch in enumerate(trainer.batches.after(0))]
    assert sum(m["train/floor_accuracy"] for m in metrics[-20:]) / 20 > 0.9


# -- what is told, and what is refused


def test_a_head_of_zeros_is_at_chance_before_training_and_in_its_first_step():
    """A tie is half right: no curve begins with a jump that only says that nothing was learned yet."""
    trainer = trainer_for(sft_config())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "heads" in name and "reward" in name:
                parameter.zero_()
    found = trainer.evaluate()
    assert (found["eval/reward_accuracy"], found["eval/reward_ece"]) == (0.5, 0.0)
    assert trainer.step(0, trainer.train_rows[:4])["train/reward_accuracy"] == 0.5


def test_the_evaluation_before_training_is_logged_as_step_zero():
    logged = {}

    class Recording(Silent):
        def log(self, step, metrics):
            logged[step] = metrics

    trainer = trainer_for(sft_config(), run=Recording())
    before = trainer.evaluate()
    trainer.train()
    assert logged[0] == before
    assert min(logged) == 0
    assert trainer.best_step != 0


def test_an_evaluation_tells_accuracy_spread_and_calibration():
    config = sft_config(reward_heads=3)
    trainer = trainer_for(config)
    found = trainer.evaluate()
    apart, members = [], []
    for row in trainer.eval_rows:
        said = Said(trainer.model, row)
        members += [said.chosen[-1], said.rejected[-1]]
        apart.append(sum(said.chosen[-1]) / 3 - sum(said.rejected[-1]) / 3)
    assert found["eval/reward_accuracy"] == sum(a > 0 for a in apart) / 8
    assert found["eval/reward_spread"] == pytest.approx(torch.tensor(members).std(dim=1).mean().item(), rel=CLOSE)
    gaps: dict[int, float] = {}
    for a in apart:
        p = 1 / (1 + math.exp(-abs(a)))
        gaps[int((p - 0.5) * 20)] = gaps.get(int((p - 0.5) * 20), 0.0) + (a > 0) - p
    assert found["eval/reward_ece"] == pytest.approx(sum(map(abs, gaps.values())) / 8, rel=1e-4)


def test_what_is_not_trained_is_not_told():
    trainer = trainer_for(sft_config(reward_coef=0.0), rows=pairs(16))
    assert trainer.evaluate()["eval/reward_ece"] is None
    found = trainer_for(sft_config()).evaluate()
    assert set(found) == {"eval/loss", "eval/perplexity", "eval/reward_accuracy", "eval/reward_ece"}


def test_the_expected_reward_is_in_the_loss_that_is_told():
    config = sft_config(reward_loss="advantage", reward_coef=0.5)
    trainer = trainer_for(config)
    found = trainer.step(0, next(trainer.batches.after(0)))
    wanted = found["loss/sft"] + 0.5 * (found["loss/reward"] + found["loss/expected"])
    assert found["loss/total"] == pytest.approx(wanted)
    assert found["loss/expected"] > 0


def test_heads_that_are_not_those_of_the_settings():
    line = "reward_heads=3 and reward_loss='bradley-terry' do not fit a model of 1 reward heads without an expected reward"
    with pytest.raises(ConfigError, match=line):
        trainer_for(sft_config(reward_heads=3), hydra("sft"))
    with pytest.raises(ConfigError, match=r"build it with heads=HeadPlan\(1, True\)"):
        trainer_for(sft_config(reward_loss="advantage"), hydra("sft"))
    trainer_for(sft_config(reward_coef=0.0), model_for(sft_config(reward_heads=3)))  # which leaves them as they are


def test_margins_that_were_not_loaded():
    config = sft_config(reward_loss="margin")
    trainer = JointSFTTrainer(model_for(config), config, pairs(16), pad_token_id=0)
    with pytest.raises(ConfigError, match="reward_loss='margin' needs the margin of each pair"):
        trainer.step(0, next(trainer.batches.after(0)))


@pytest.mark.parametrize("name", ["five heads", "divergent", "advantage", "floor"])
def test_each_learns(name):
    config = sft_config(**LOSSES[name], epochs=8, reward_coef=0.5)
    torch.manual_seed(0)
    from hydra_ppo.model.hydra import HydraModel

    plan = head_plan(config)
    assert plan == HeadPlan(config.reward_heads, name == "advantage")
    model = HydraModel.from_config(llama(), train="sft", heads=plan)
    rows = [replace(row, margin=0.0) for row in pairs(64)]
    summary = JointSFTTrainer(model, config, rows, pairs(80)[64:], pad_token_id=0).train()
    assert summary["eval/reward_accuracy"] > 0.9
    assert 0 <= summary["eval/reward_ece"] < 0.5
