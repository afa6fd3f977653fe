"""The parts of the sampler: drawing by one number a row, the cache that grows in place, masks, and prompts that are shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from hydra_ppo.compat import MASKS_BY_LAYER_TYPE
from hydra_ppo.compute import drawing, kv_cache
from hydra_ppo.compute.drawing import draw, invert
from hydra_ppo.compute.kv_cache import KVCache, new_cache
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.errors import ConfigError, NonFiniteError
from hydra_ppo.rollout import decoder, lean_decoding
from hydra_ppo.rollout.sampling import sample
from hydra_ppo.training.ppo import PPOTrainer
from tests.families import FAMILIES, PROMPTS, VOCABULARY
from tests.hydra_ppo.rollout.test_collect import CLOSE, build, generator, logprobs_by_pass, settings
from tests.training import hydra, ppo_config, prompts, tokenizer

NEVER = [VOCABULARY + 1]
JUST_BELOW_1 = 1 - 2.0**-53
HAS_LAYERS = isinstance(new_cache(1), KVCache)
EQUAL_LENGTHS = [[5, 6, 7], [11, 12, 13], [21, 22, 23], [31, 32, 33]]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=dtype)


# -- drawing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "block"), [(13, 4), (12, 4), (3, 4), (1, 4), (700, 256), (512, 256)])
def test_every_token_has_its_share_of_the_numbers(size, block, monkeypatch):
    """With whole weights w of sum n, of the n numbers (i + 0.5) / n exactly w_j hit token j, in the order of the tokens."""
    monkeypatch.setattr(drawing, "BLOCK", block)
    weights = torch.randint(0, 4, (size,), generator=generator())
    weights[0] += 1  # some weight, also where there is one token
    count = int(weights.sum())
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = invert(weights.float().expand(count, size), numbers)
    assert tokens.tolist() == torch.arange(size).repeat_interleave(weights).tolist()


def test_a_number_on_a_boundary_hits_the_token_above_it(monkeypatch):
    monkeypatch.setattr(drawing, "BLOCK", 4)
    numbers = torch.arange(8, dtype=torch.float64) / 8  # exact; 4 / 8 lies between the two blocks
    assert invert(torch.ones(8, 8), numbers).tolist() == list(range(8))
    assert invert(torch.ones(7, 8), numbers[1:] - 2.0**-50).tolist() == list(range(7))


@pytest.mark.parametrize("number", [0.0, 2.0**-53, 0.5, JUST_BELOW_1])
def test_what_has_no_weight_is_never_hit(number, monkeypatch):
    monkeypatch.setattr(drawing, "BLOCK", 4)
    rows = 2000
    weights = seeded(rows, 22)  # sums of all kinds, so that their product with the number is rounded either way
    weights[seeded(rows, 22, seed=1) < 0.7] = 0
    weights[:, :6] = 0  # a block and a half at the beginning, the rest of one at the end
    weights[:, 18:] = 0
    weights[:, 9] += 1e-3
    tokens = invert(weights, torch.full((rows,), number, dtype=torch.float64))
    assert (weights.gather(1, tokens[:, None]) > 0).all()
    positive = weights > 0
    if number == 0.0:
        assert torch.equal(tokens, positive.float().argmax(dim=1))
    if number == JUST_BELOW_1:
        assert torch.equal(tokens, 21 - positive.flip(1).float().argmax(dim=1))


def test_draws_follow_the_distribution():
    """Pearson's statistic of 40 000 draws has mean 599 and standard deviation sqrt(2 * 599) = 34.6 for 600 tokens."""
    size, count = 600, 40_000
    logits = seeded(1, size, seed=3) * 3
    numbers = seeded(count, seed=4, dtype=torch.float64)
    expected = logits[0].softmax(dim=0) * count
    tokens = torch.cat([draw(logits.repeat(1000, 1), part).tokens for part in numbers.split(1000)])
    found = torch.bincount(tokens, minlength=size)
    statistic = ((found - expected) ** 2 / expected).sum().item()
    assert expected.min() > 5
    assert abs(statistic - (size - 1)) < 4 * (2 * (size - 1)) ** 0.5


def test_logprobs_are_those_of_the_whole_distribution():
    logits = seeded(50, 1000, seed=5) * 30 - 40
    logits[:, 7] = -torch.inf
    allowed = torch.tensor([7, 300, 301, 999])
    expected = logits.double().log_softmax(dim=-1)

    def keep(scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_copy_(1, allowed, scores[:, allowed])

    numbers = seeded(50, seed=6, dtype=torch.float64)
    for drawn in (draw(logits.clone(), numbers), draw(logits.clone(), numbers, keep)):
        wanted = expected.gather(1, drawn.tokens[:, None])[:, 0]
        torch.testing.assert_close(drawn.logprobs.double(), wanted, rtol=1e-6, atol=1e-6)
    assert set(draw(logits.clone(), numbers, keep).tokens.tolist()) <= {300, 301, 999}
    assert len(set(draw(logits.clone(), numbers).tokens.tolist())) > 10


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_logits_give_nan_in_their_own_row(bad):
    logits = seeded(3, 300)
    numbers = seeded(3, dtype=torch.float64)
    good = draw(logits.clone(), numbers)
    logits[1, 299] = bad
    found = draw(logits, numbers)
    assert found.logprobs.isnan().tolist() == [False, True, False]
    assert 0 <= found.tokens[1] < 300
    assert found.tokens[[0, 2]].equal(good.tokens[[0, 2]])
    assert draw(torch.full((1, 5), -torch.inf), numbers[:1]).logprobs.isnan().all()


def test_sampling_fails_on_nan():
    model = hydra()
    with torch.no_grad():
        model.architecture.output_embeddings.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"phase=rollout: log-probs of sampled tokens are nan; lower"):
        sample(model, PROMPTS, settings(), [2], generator())


# -- the cache -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [64, 4, 3])
def test_the_cache_holds_what_transformers_own_holds(columns, monkeypatch):
    monkeypatch.setattr(kv_cache, "COLUMNS", columns)
    limit = 17
    ours, plain = new_cache(limit), DynamicCache()
    selections = {0: [0, 0, 1, 1, 1, 2], 4: [0, 5, 2, 3], 9: [3, 1, 2], 10: [0, 2], 11: [1, 1, 0], 14: [2]}
    rows = 3
    for step in range(15):
        width = 3 if step == 0 else 1
        for layer in range(2):
            keys, values = torch.randn(2, rows, 2, width, 4).unbind(0)
            found = ours.update(keys, values[..., :3], layer)
            wanted = plain.update(keys, values[..., :3], layer)
            for mine, theirs in zip(found, wanted, strict=True):
                assert torch.equal(mine, theirs)
        assert ours.get_seq_length() == plain.get_seq_length() == 3 + step
        if (sources := selections.get(step)) is not None:
            ours.keep(sources, torch.device("cpu"))
            plain.batch_select_indices(torch.tensor(sources))
            rows = len(sources)


@pytest.mark.skipif(not HAS_LAYERS, reason="this transformers has caches without layers")
def test_storage_grows_by_blocks_and_is_written_in_place(monkeypatch):
    monkeypatch.setattr(kv_cache, "COLUMNS", 4)
    cache = KVCache(limit=10)
    rooms, places = [], []
    for width in (3, 1, 1, 1, 1, 1, 1, 1):
        columns = torch.randn(5, 2, width, 4)
        keys, _ = cache.update(columns, columns, 0)
        rooms.append(keys.untyped_storage().nbytes() // (5 * 2 * 4 * 4))
        places.append(keys.data_ptr())
    assert rooms == [4, 4, 8, 8, 8, 8, 10, 10]  # a multiple of 4, and no more than will be needed
    assert len(set(places[2:6])) == 1
    before = cache.layers[0].keys.data_ptr()
    cache.keep([0, 4, 2], torch.device("cpu"))
    assert cache.layers[0].keys.data_ptr() == before
    assert cache.layers[0].keys.shape == (3, 2, 10, 4)


# -- decoding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_one_length_give_the_numbers_of_a_pass_without_cache(family):
    """There are no holes then, and no mask unless a sliding window (5 tokens here, in some families) cuts."""
    model = build(family)
    out = sample(model, EQUAL_LENGTHS, settings(), eos_ids=list(range(2, 12)), generator=generator())
    for found, wanted in zip(out.logprobs, logprobs_by_pass(model, EQUAL_LENGTHS, out.responses, 0.8), strict=True):
        assert found == pytest.approx(wanted, abs=CLOSE)


@pytest.mark.skipif(not MASKS_BY_LAYER_TYPE, reason="this transformers makes a mask of its own")
@pytest.mark.parametrize(
    ("family", "steps", "masked"),
    # A window of 5 sees the whole of 3 prompt and 1 fed tokens, and not of 3 and 3.
    [("llama", 12, False), ("gpt2", 12, False), ("gemma3-softcap", 12, False), ("mistral", 2, False), ("mistral", 4, True)],
)
def test_attention_gets_a_mask_only_where_it_is_needed(family, steps, masked, monkeypatch):
    model = build(family)
    given = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, *args, **options):
        if query.shape[0] == len(EQUAL_LENGTHS) and key.shape[2] > 3:
            given.append((options["attn_mask"] is not None, key.shape[1]))
        return plain(query, key, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(lean_decoding, "SHORT", 0)
    sample(model, EQUAL_LENGTHS, settings(max_new_tokens=steps), NEVER, generator())
    heads = getattr(model.causal_lm.config, "num_key_value_heads", 4)  # not copied for their groups of queries
    assert [has_mask for has_mask, _ in given] == [masked] * (3 * (steps - 1))
    assert masked or {count for _, count in given} == {heads}


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_equal_prompts_are_run_once_and_give_the_same_numbers(family, monkeypatch):
    model = build(family)
    model.check = "off"  # which would be the first to run rows
    plain = model.hidden_states
    rows = []

    def hidden_states(input_ids, **options):
        rows.append(tuple(input_ids.shape))
        return plain(input_ids, **options)

    monkeypatch.setattr(model, "hidden_states", hidden_states)
    shared = [PROMPTS[i] for i in (1, 0, 1, 2, 0, 1)]
    found = sample(model, shared, settings(), NEVER, generator())
    assert rows[0] == (3, 7)
    rows.clear()
    monkeypatch.setattr(decoder, "_distinct", lambda prompts: (list(prompts), list(range(len(prompts)))))
    wanted = sample(model, shared, settings(), NEVER, generator())
    assert rows[0] == (6, 7)
    assert found.responses == wanted.responses
    for mine, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=CLOSE)
    assert len({tuple(response) for response in found.responses}) == 6  # equal prompts, random numbers of their own


def test_a_response_does_not_depend_on_who_has_ended():
    """With end tokens, responses are those without them, cut at the first one."""
    model = build()
    ends = list(range(2, 12))
    for prompt_set in (PROMPTS * 3, EQUAL_LENGTHS * 2):
        whole = sample(model, prompt_set, settings(), NEVER, generator()).responses
        cut = sample(model, prompt_set, settings(), ends, generator()).responses
        first = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in whole]
        assert cut == [row[: i + 1] for row, i in zip(whole, first, strict=True)]
        assert len({len(row) for row in cut}) > 3


@pytest.mark.skipif(not MASKS_BY_LAYER_TYPE, reason="this transformers looks into masks")
def test_the_device_is_waited_for_once_a_step(monkeypatch):
    model = build()
    reads = []
    for name in ("tolist", "item", "__bool__", "nonzero"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *args, _name=name, _plain=plain: (reads.append(_name), _plain(*args))[1])
    waits = []
    for steps in (4, 12):
        reads.clear()
        sample(model, PROMPTS, settings(max_new_tokens=steps), NEVER, generator())
        waits.append(len(reads))
    assert waits[1] - waits[0] <= 12 - 4


# -- several samples of a prompt -----------------------------------------------------------------------------------------


def test_batches_hold_each_prompt_as_often_as_it_is_sampled():
    config = ppo_config(rollout=RolloutSettings(batch_size=8, samples_per_prompt=4, max_new_tokens=3), steps=1, ppo_epochs=1)
    taken = []

    def sampler(model, prompts, *args, **options):
        taken.append([tuple(prompt) for prompt in prompts])
        return sample(model, prompts, *args, **options)

    model = hydra()
    model.reward_head_trained = True
    trainer = PPOTrainer(model, tokenizer(), config, prompts(4), sampler=sampler)
    for step in (1, 2):
        trainer.step(step)
    for batch in taken:
        assert batch == [batch[0]] * 4 + [batch[4]] * 4
    # An epoch of 4 prompts is two steps.
    assert sorted([taken[0][0], taken[0][4], taken[1][0], taken[1][4]]) == sorted(row.ids for row in prompts(4))


def test_a_batch_must_hold_whole_groups():
    with pytest.raises(
        ConfigError, match=r"batch_size=8 is not divisible by samples_per_prompt=3; choose a samples_per_prompt"
    ):
        RolloutSettings(batch_size=8, samples_per_prompt=3)
    with pytest.raises(ConfigError, match="samples_per_prompt=0 must be greater than 0"):
        replace(RolloutSettings(), samples_per_prompt=0)
