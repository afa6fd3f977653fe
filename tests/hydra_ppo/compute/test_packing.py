"""Rows laid end to end give what padded rows give, and no padding is computed."""

from __future__ import annotations

import pytest
import torch

from hydra_ppo.compat import register_attention
from hydra_ppo.compute.packing import BY_LENGTH, Packing, attend_by_length
from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rollout.collect import score
from tests.families import FAMILIES, randomise

SAME = 2e-5
"""Relative to the largest entry: the products have other shapes, so sums have another order."""

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18], [19, 20]]
RESPONSES = [[21, 22, 23], [24, 25, 26, 27, 28, 29, 30, 31], [32], [33, 34, 35, 36, 37, 38, 39, 40]]

pytestmark = pytest.mark.skipif(
    not register_attention("probe", attend_by_length), reason="rows stay padded before transformers 5"
)


def rows() -> Experience:
    return Experience.from_lists(PROMPTS, RESPONSES, 0, CPU)


def build(family: str = "llama", **options) -> HydraModel:
    torch.manual_seed(0)
    model = HydraModel.from_config(FAMILIES[family], **options)
    randomise(model)
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= SAME * expected.abs().max())


def test_where_the_tokens_of_three_rows_lie():
    packing = Packing([3, 1, 2], 4, CPU)
    ids = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]])
    assert packing.pack(ids).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert packing.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packing.unpack(packing.pack(ids)).tolist() == ids.tolist()
    assert packing.starts.tolist() == [0, 3, 4]
    assert packing.options(BY_LENGTH)["row_lengths"] == (3, 1, 2)
    options = packing.options("flash_attention_2")
    assert options["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert options["cu_seq_lens_q"].dtype == torch.int32
    assert options["max_length_k"] == 3


def trunk_of(model: HydraModel) -> torch.Tensor:
    """What leaves the trunk, as scoring keeps it."""
    experience = rows()
    trunk = score(model, experience, torch.zeros(experience.response_ids.shape), RolloutSettings(batch_size=4)).trunk
    assert trunk is not None
    return trunk


def results(model: HydraModel, trunk: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Numbers of all roles at positions that count, and the gradients of actor and critic."""
    experience = rows()
    if trunk:
        experience = experience.with_trunk(trunk_of(model))
    sequences, mask = experience.sequences(), experience.response_mask
    found = {}
    for role in ("actor", "critic"):
        with model.role(role):
            numbers = model.logprobs(sequences).logprobs if role == "actor" else model.values(sequences)
            found[role] = numbers.detach()[mask]
            (numbers * mask).square().sum().backward()
    with torch.no_grad():
        ref_logprobs, found["scores"] = model.reference_and_reward(sequences)
    found["reference"] = ref_logprobs[mask]
    gradients = {n: p.grad for role in ("actor", "critic") for n, p in model.role_parameters(role).items()}
    return found, gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_roles_and_gradients_equal_those_of_padded_rows(family, checkpointing):
    answers = []
    for packing in (True, False):
        model = build(family, packing=packing)
        assert model.packs == packing
        model.enable_checkpointing(checkpointing)
        answers.append(results(model))
    for mine, theirs in zip(*answers, strict=True):
        assert mine.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert close(mine[name], expected), name


@pytest.mark.parametrize("packing", [True, False])
def test_a_trunk_is_kept_by_row_whatever_the_passes_are(packing):
    model, plain = build(trunk_layers=2, packing=packing), build(trunk_layers=2, packing=False)
    mask = torch.arange(10)[None] < torch.tensor(rows().lengths)[:, None]
    assert close(trunk_of(model)[mask], trunk_of(plain)[mask])
    for mine, theirs in zip(results(model, trunk=True), results(plain, trunk=True), strict=True):
        for name, expected in theirs.items():
            assert close(mine[name], expected), name


def test_layers_see_the_tokens_and_no_padding():
    model = build()
    seen = []
    model.architecture.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(tuple(args[0].shape[:2])))
    sequences = rows().sequences()
    with torch.no_grad(), model.role("critic"):
        model.values(sequences)
        model.packing = False
        model.values(sequences)
    assert seen == [(1, 10 + 10 + 6 + 10), (4, 10)]


def test_rows_of_one_length_are_left_as_they_are():
    model = build()
    seen = []
    model.architecture.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(tuple(args[0].shape[:2])))
    batch = Experience.from_lists([[5, 6, 7], [8, 9]], [[10], [11, 12]], 0, CPU)
    with torch.no_grad(), model.role("critic"):
        model.values(batch.sequences())
    assert seen == [(2, 4)]


def test_the_attention_of_the_model_is_back_afterwards_and_after_an_error():
    model = build()
    before = model.architecture.config._attn_implementation
    with model.role("critic"):
        model.values(rows().sequences())
        handle = model.architecture.layers[1].register_forward_pre_hook(lambda layer, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.values(rows().sequences())
        handle.remove()
    assert model.architecture.config._attn_implementation == before


def test_a_family_that_nobody_tried_stays_padded():
    from transformers import GraniteConfig

    config = GraniteConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, logits_scaling=1.0
    )
    assert not HydraModel.from_config(config).packs
