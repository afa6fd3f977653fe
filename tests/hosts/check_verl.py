"""The engine `hydra` under verl 0.9.1 on a CPU, with verl's own configs, batches and losses: `make test-verl`.

What it computes is compared with separate models of transformers and PEFT, built here from the same weights.
"""

from __future__ import annotations

from tests.hosts import verl_on_cpu  # noqa: F401  # before anything of verl

# isort: split
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tensordict import TensorDict
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, FSDPCriticConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss, value_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from hydra_ppo import HydraModel
from hydra_ppo.errors import HydraError
from hydra_ppo.patches import verl_base
from hydra_ppo.patches.versions import HostError

CLOSE = 5e-6
"""Largest difference of log-probs, entropies and values from separate models, in nats, and of gradients: fp32, sums in
another order."""
STEP = 2e-6
"""Of a parameter after a step of AdamW at LR whose gradients differ by as little."""
LR = 1e-3
CLIP = 0.2
RANK, VOCABULARY, WIDTH = 4, 97, 32
PROMPTS, RESPONSES = (3, 7, 1, 5, 6, 2), (4, 1, 6, 3, 6, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verl") / "base"
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=64, **shape)
    config.architectures = ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def one_base_a_test():
    """A traceback keeps the engines of a test that failed."""
    yield
    verl_base._shared.clear()


def configs(base: Path, role: str = "actor", model=None, engine=None, optim=None, **changes):
    """verl's configs of one role, as its trainer hands them to an engine."""
    settings = {"path": str(base), "load_tokenizer": False, "lora_rank": RANK, "lora_alpha": 8}
    if role == "critic":
        settings["lora_rank"] = 0  # the actor's
    engine = {"mixed_precision": {"param_dtype": "fp32"}, "use_dynamic_bsz": True} | (engine or {})
    engine_config = FSDPEngineConfig(**engine)
    object.__setattr__(engine_config, "strategy", "hydra")
    return {
        "model_config": HFModelConfig(**settings | (model or {})),
        "engine_config": engine_config,
        "optimizer_config": FSDPOptimizerConfig(
            **{"lr": LR, "clip_grad": CLIP, "total_training_steps": 10, "weight_decay": 0.1} | (optim or {})
        ),
        "checkpoint_config": CheckpointConfig(**changes.get("checkpoint", {})),
    }


def make(base: Path, role: str = "actor", **changes):
    kind = "value_model" if role == "critic" else "language_model"
    return EngineRegistry.new(model_type=kind, backend="hydra", **configs(base, role, **changes))


def engines(base: Path, random: bool = True, actor=None, critic=None):
    """Critic first, as verl makes them; adapters and value head far from zero."""
    pair = make(base, "critic", **critic or {}), make(base, **actor or {})
    for engine in pair:
        engine.initialize()
    critic, actor = pair
    if random:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for role in ("actor", "critic"):
                for parameter in actor.stand().role_parameters(role).values():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    critic.stand()
    return actor, critic


def batch(rows=range(6), cut: int | None = 14, **more) -> TensorDict:
    """Left- and right-padded rows as verl's rollout leaves them, without padding as its trainer hands them on."""
    generator = torch.Generator().manual_seed(3)
    count, width, length = len(PROMPTS), max(PROMPTS), max(RESPONSES)
    prompts = torch.randint(3, VOCABULARY, (count, width), generator=generator)
    responses = torch.randint(3, VOCABULARY, (count, length), generator=generator)
    left = torch.stack([torch.arange(width) >= width - p for p in PROMPTS])
    right = torch.stack([torch.arange(length) < r for r in RESPONSES])
    mask = torch.cat([left, right], dim=1).long()
    spoken = right.clone()
    spoken[2, 2:4] = False  # what a tool said in the middle of the third response
    numbers = {
        name: torch.randn(count, length, generator=generator) * scale
        for name, scale in (("old_log_probs", 0.3), ("advantages", 1.0), ("values", 1.0), ("returns", 1.0))
    }
    numbers["old_log_probs"] -= 4.5
    tensors = {
        "prompts": prompts * left,
        "responses": responses * right,
        "input_ids": torch.cat([prompts, responses], dim=1) * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "response_mask": spoken.long(),
        "temperature": torch.tensor([0.7, 1.0, 0.7, 1.3, 1.0, 1.0]),
        **numbers,
    }
    rows = list(rows)
    data = left_right_2_no_padding(TensorDict({k: v[rows] for k, v in tensors.items()}, batch_size=[len(rows)]))
    tu.assign_non_tensor(data, global_batch_size=6, calculate_entropy=True)
    if cut is None:
        tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=2)
    else:
        tu.assign_non_tensor(data, use_dynamic_bsz=True, max_token_len_per_gpu=cut)
    for name, value in more.items():
        data.pop(name, None)
        tu.assign_non_tensor(data, **{name: value})
    return data


def padded(found, name: str, data) -> torch.Tensor:
    return no_padding_2_padding(found["model_output"][name], data)


def actor_loss(entropy_coeff: float = 0.0):
    config = {"rollout_n": 1, "ppo_micro_batch_size_per_gpu": 2, "entropy_coeff": entropy_coeff, "strategy": "hydra"}
    return partial(ppo_loss, config=FSDPActorConfig(**config, fsdp_config=FSDPEngineConfig()))


def critic_loss():
    return partial(value_loss, config=FSDPCriticConfig(strategy="hydra", ppo_micro_batch_size_per_gpu=2))


# -- separate models -------------------------------------------------------------------------------------------------------


def separate(base: Path, model: HydraModel, role: str) -> nn.Module:
    """A model of transformers with an adapter of PEFT, of the same weights, that shares nothing."""
    plain = AutoModelForCausalLM.from_pretrained(base) if role == "actor" else AutoModel.from_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(plain, LoraConfig(r=RANK, lora_alpha=8, target_modules=targets))
    named = {n.split(".", 1)[1]: p.detach().clone() for n, p in model.role_parameters(role).items() if "lora_" in n}
    if role == "actor":
        state = {name.replace(".{}.", "."): value for name, value in named.items()}
    else:  # the backbone alone: one `model.` less
        state = {
            name.replace(".{}.", ".").replace("base_model.model.model.", "base_model.model."): v for name, v in named.items()
        }
    found = set_peft_model_state_dict(peft, state)
    assert not found.unexpected_keys
    if role == "critic":
        peft.value_head = nn.Linear(WIDTH, 1, bias=False)
        peft.value_head.weight.data.copy_(model.heads["value"].weight)
    return peft


def outputs(model: nn.Module, data, role: str) -> dict[str, torch.Tensor]:
    """Jagged numbers at all places, row by row, through whole logits."""
    temperature = data["temperature"]
    rows = data["input_ids"].unbind()
    found: dict[str, list] = {"log_probs": [], "entropy": [], "values": []}
    for row, ids in enumerate(rows):
        if role == "critic":
            found["values"].append(model.value_head(model(ids[None]).last_hidden_state)[0, :, 0])
            continue
        scale = temperature[row] if isinstance(temperature, torch.Tensor) else temperature
        logs = (model(ids[None]).logits[0] / scale).log_softmax(dim=-1)
        found["log_probs"].append(logs.gather(1, ids.roll(-1)[:, None])[:, 0])
        found["entropy"].append(-(logs.exp() * logs).sum(dim=-1))
    return {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in found.items() if rows}


def gap(found: torch.Tensor, expected: torch.Tensor, data) -> float:
    mask = data["attention_mask"][:, data["prompts"].shape[1] :].bool()
    return (found - expected)[mask].abs().max().item()


# -- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [14, 30, None], ids=["dynamic", "few", "by-rows"])
@pytest.mark.parametrize("temperature", ["rows", 0.7, 1.0], ids=str)
def test_log_probs_and_entropy_are_those_of_a_separate_model(base, cut, temperature):
    actor, _ = engines(base)
    data = batch(cut=cut) if temperature == "rows" else batch(cut=cut, temperature=temperature)
    with actor.eval_mode():
        found = actor.infer_batch(data)
    with torch.no_grad():
        expected = outputs(separate(base, actor.stand(), "actor"), data, "actor")
    for name in ("log_probs", "entropy"):
        off = gap(padded(found, name, data), no_padding_2_padding(expected[name], data), data)
        print(f"{name}, temperature {temperature}: {off:.1e}")
        assert off < CLOSE


def test_rows_without_prompts_are_predicted_whole(base):
    """As verl's SFT hands them over, and jagged ones as its newer trainer does."""
    actor, _ = engines(base)
    data = batch(temperature=1.0)
    jagged = batch(temperature=1.0)
    for name, side in (("prompts", slice(0, max(PROMPTS))), ("responses", slice(max(PROMPTS), None))):
        masks = jagged["attention_mask"][:, side].bool()
        jagged[name] = torch.nested.as_nested_tensor(
            [row[mask] for row, mask in zip(jagged.pop(name), masks, strict=True)], layout=torch.jagged
        )
    spoken = jagged.pop("loss_mask")
    jagged["loss_mask"] = torch.nested.as_nested_tensor(
        [row[:length] for row, length in zip(spoken, RESPONSES, strict=True)], layout=torch.jagged
    )
    alone = batch(temperature=1.0)
    del alone["prompts"], alone["responses"]
    plain, nested, whole = (actor.infer_batch(rows)["model_output"]["log_probs"] for rows in (data, jagged, alone))
    assert torch.equal(plain.values(), nested.values())
    with torch.no_grad():
        expected = outputs(separate(base, actor.stand(), "actor"), alone, "actor")["log_probs"]
    for ours, theirs in zip(whole.unbind(), expected.unbind(), strict=True):
        assert (ours[:-1] - theirs[:-1]).abs().max() < CLOSE  # the last one predicts nothing


def test_values_are_those_of_a_separate_critic(base):
    actor, critic = engines(base)
    data = batch()
    found = critic.infer_batch(data)
    with torch.no_grad():
        expected = outputs(separate(base, actor.stand(), "critic"), data, "critic")
    off = gap(padded(found, "values", data), no_padding_2_padding(expected["values"], data), data)
    print(f"values: {off:.1e}")
    assert off < CLOSE


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("cut", [14, None], ids=["dynamic", "by-rows"])
def test_gradients_and_a_step_are_those_of_a_separate_model(base, role, cut):
    """The separate one takes all rows at once, and torch's own AdamW."""
    actor, critic = engines(base)
    engine, loss = (actor, actor_loss(0.01)) if role == "actor" else (critic, critic_loss())
    other = separate(base, actor.stand(), role)
    data = batch(cut=cut)
    expected_data = batch(cut=cut)
    tu.assign_non_tensor(expected_data, dp_size=1, batch_num_tokens=expected_data["loss_mask"].sum().item())
    expected, _ = loss(model_output=outputs(other, expected_data, role), data=expected_data)
    expected.backward()
    trained = {name: p for name, p in other.named_parameters() if p.requires_grad}
    norm = nn.utils.clip_grad_norm_(trained.values(), CLIP).item()
    with engine.train_mode(zero_grad_on_exit=False):
        found = engine.train_batch(data, loss_function=loss)
        gradients = {n: p.grad.clone() for n, p in engine.stand().role_parameters(role).items()}
    ours = {_peft_name(name, role): value for name, value in gradients.items()}
    assert ours.keys() == trained.keys()
    off = max((ours[name] - p.grad).abs().max().item() for name, p in trained.items())
    print(f"{role}: loss {sum(found['loss']):.6f}, gradients {off:.1e}, norm {found['metrics']['grad_norm']:.6f}")
    assert off < CLOSE
    assert abs(sum(found["loss"]) - expected.item()) < CLOSE
    assert abs(found["metrics"]["grad_norm"] - norm) < 1e-5
    assert norm > CLIP  # so that the clip is at work
    torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.1, betas=(0.9, 0.999)).step()
    after = {_peft_name(n, role): p for n, p in engine.stand().role_parameters(role).items()}
    off = max((after[name] - p).abs().max().item() for name, p in trained.items())
    print(f"{role}: parameters after a step {off:.1e}")
    assert off < STEP
    assert all(p.grad is None for n, p in engine.stand().named_parameters() if f".{role}." not in n and "value" not in n)


def _peft_name(name: str, role: str) -> str:
    name = name.split(".", 1)[1].replace(".{}.", ".default.")
    if role == "critic":
        name = name.replace("base_model.model.model.", "base_model.model.")
    return name


def test_the_reference_is_the_same_to_the_last_bit_after_steps(base):
    actor, critic = engines(base, random=False)
    data = batch(temperature=1.0)

    def reference():
        with actor.eval_mode(), actor.disable_adapter():
            return actor.infer_batch(batch(temperature=1.0))["model_output"]["log_probs"].values()

    before, policy = reference(), actor.infer_batch(batch(temperature=1.0))["model_output"]["log_probs"].values()
    assert torch.equal(before, policy)  # a fresh adapter changes nothing
    weights = {n: p.clone() for n, p in actor.stand().named_parameters() if "lora_" not in n and not n.startswith("heads")}
    for _ in range(3):
        for engine, loss in ((actor, actor_loss()), (critic, critic_loss())):
            with engine.train_mode():
                engine.train_batch(batch(temperature=1.0), loss_function=loss)
            assert engine.lr_scheduler_step() == LR
    assert torch.equal(reference(), before)
    assert not torch.equal(actor.infer_batch(data)["model_output"]["log_probs"].values(), before)
    assert all(torch.equal(p, weights[n]) for n, p in actor.stand().named_parameters() if n in weights)
    with torch.no_grad():
        plain = outputs(AutoModelForCausalLM.from_pretrained(base), data, "actor")["log_probs"]
    assert gap(no_padding_2_padding(_jagged(before, data), data), no_padding_2_padding(plain, data), data) < CLOSE


def _jagged(flat, data):
    return torch.nested.nested_tensor_from_jagged(flat, data["input_ids"].offsets())


def test_what_recomputes_and_what_packs_gives_the_same(base):
    plain = {"model": {"enable_gradient_checkpointing": False, "use_remove_padding": False}}
    found = []
    for changes in ({}, plain):
        actor, _ = engines(base, actor=changes, critic=changes)
        with actor.train_mode(zero_grad_on_exit=False):
            actor.train_batch(batch(), loss_function=actor_loss(0.01))
            found.append(torch.cat([p.grad.flatten() for p in actor.parameters]))
        assert actor.stand().checkpointing is not bool(changes)
        del actor, _
    assert (found[0] - found[1]).abs().max() < CLOSE


def test_gradients_that_are_not_finite_are_no_step(base):
    actor, _ = engines(base)
    before = [p.clone() for p in actor.parameters]

    def bad(model_output, data, dp_group):
        return model_output["log_probs"].values().sum() * float("nan"), {}

    with actor.train_mode():
        norm = actor.train_batch(batch(), loss_function=bad)["metrics"]["grad_norm"]
    assert norm != norm
    assert all(torch.equal(p, q) for p, q in zip(actor.parameters, before, strict=True))


def test_verls_own_worker_trains_both_roles(base, monkeypatch):
    """Two epochs by verl's TrainingWorker leave the bits that two steps by hand do."""
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    cut = {"max_token_len_per_gpu": 14, "infer_max_token_len_per_gpu": 14}
    workers = {}
    for role, kind, loss in (("critic", "value_model", critic_loss()), ("actor", "language_model", actor_loss())):
        workers[role] = TrainingWorker(TrainingWorkerConfig(model_type=kind, **configs(base, role, engine=cut)))
        workers[role].flops_counter = None  # which asks for the name of a GPU
        workers[role].reset()
        workers[role].set_loss_fn(loss)
    torch.manual_seed(1)
    pair = workers["actor"].engine, workers["critic"].engine
    start = {n: p.clone() for n, p in pair[0].stand().named_parameters()}
    for role in ("actor", "critic"):
        data = batch(mini_batch_size=6, epochs=2, dataloader_kwargs={"shuffle": False})
        metrics = tu.get(workers[role].train_mini_batch(data), "metrics")
        print(f"{role}: losses {metrics['loss']}, norms {metrics['grad_norm']}, rate {metrics['lr']}")
        assert len(metrics["grad_norm"]) == 2
    found = {n: p.clone() for n, p in pair[0].stand().named_parameters()}
    reference = tu.get(workers["actor"].infer_batch(batch(compute_loss=False, no_lora_adapter=True)), "log_probs")
    assert reference.values().shape == (sum(PROMPTS) + sum(RESPONSES),)
    del workers, pair
    verl_base._shared.clear()
    pair = engines(base, random=False)
    with torch.no_grad():
        for name, parameter in pair[0].stand().named_parameters():
            parameter.copy_(start[name])
    steps(pair, 2)
    assert all(torch.equal(p, found[n]) for n, p in pair[0].stand().named_parameters())


# -- files and rollouts ----------------------------------------------------------------------------------------------------


def steps(pair, count: int):
    for _ in range(count):
        for engine, loss in zip(pair, (actor_loss(), critic_loss()), strict=True):
            with engine.train_mode():
                engine.train_batch(batch(), loss_function=loss)
            engine.lr_scheduler_step()


COSINE = {"optim": {"lr_scheduler_type": "cosine", "lr_warmup_steps": 2}}


def test_what_is_loaded_goes_on_bit_for_bit(base, tmp_path):
    offloaded = COSINE | {"engine": {"optimizer_offload": True}}
    pair = engines(base, actor=COSINE, critic=COSINE)
    steps(pair, 2)
    for engine, name in zip(pair, ("actor", "critic"), strict=True):
        engine.save_checkpoint(str(tmp_path / "global_step_2" / name), global_step=2)
    drawn = torch.rand(3)
    steps(pair, 2)
    expected = {n: p.clone() for n, p in pair[0].stand().named_parameters()}
    rates = [engine.schedule.get_last_lr() for engine in pair]
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    print(*written, sep="\n")
    saved = HydraModel.from_pretrained(tmp_path / "global_step_2/actor/hydra", dtype="fp32")
    del pair, engine
    pair = engines(base, random=False, actor=offloaded, critic=COSINE)
    actor = pair[0]
    for engine, name in zip(pair, ("actor", "critic"), strict=True):
        engine.load_checkpoint(str(tmp_path / "global_step_2" / name))
    assert torch.equal(torch.rand(3), drawn)
    for name, parameter in actor.stand().role_parameters("actor").items():
        assert torch.equal(parameter, saved.role_parameters("actor")[name])
    steps(pair, 2)
    assert [engine.schedule.get_last_lr() for engine in pair] == rates
    assert all(torch.equal(p, expected[n]) for n, p in actor.stand().named_parameters())


def test_old_checkpoints_are_removed_and_broken_ones_named(base, tmp_path):
    actor, critic = engines(base)
    for step in range(3):
        actor.save_checkpoint(str(tmp_path / str(step)), max_ckpt_to_keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    with pytest.raises(
        HydraError, match=r"checkpoint '.*none' could not be read by rank 0 .*; name another one as trainer.resume_from_path"
    ):
        actor.load_checkpoint(str(tmp_path / "none"))
    with pytest.raises(HydraError, match="could not be read by rank 0"):
        critic.load_checkpoint(str(tmp_path / "2"))  # the actor's
    with pytest.raises(HostError, match="default_hdfs_dir"):
        actor.save_checkpoint(str(tmp_path / "3"), hdfs_path="hdfs://somewhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(HydraError, match="could not be written by rank 0"):
        actor.save_checkpoint(str(tmp_path / "file"))


def test_a_rollout_gets_the_adapter_as_peft_has_it(base):
    actor, critic = engines(base)
    tensors, config = actor.get_per_tensor_param(layered_summon=False, base_sync_done=True)
    tensors = dict(tensors)
    other = separate(base, actor.stand(), "actor")
    from peft import get_peft_model_state_dict
    from verl.utils.fsdp_utils import replace_lora_wrapper

    expected = get_peft_model_state_dict(other)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    theirs = other.peft_config["default"]
    assert {key: config[key] for key in ("r", "lora_alpha", "lora_dropout", "bias", "peft_type")} == {
        key: theirs.to_dict()[key] for key in ("r", "lora_alpha", "lora_dropout", "bias", "peft_type")
    }
    assert config["task_type"].value == "CAUSAL_LM"
    assert set(config["target_modules"]) == set(theirs.target_modules)
    base_tensors, _ = actor.get_per_tensor_param(base_sync_done=False)
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    wanted = {replace_lora_wrapper(name, theirs): value for name, value in plain.items()}  # as verl's FSDP engine names them
    base_tensors = dict(base_tensors)
    assert base_tensors.keys() == wanted.keys()
    assert all(torch.equal(base_tensors[name], wanted[name]) for name in wanted)
    with pytest.raises(HostError, match="backend sends whole weights"):
        actor.get_per_tensor_param()
    with pytest.raises(HostError, match="the critic's weights"):
        critic.get_per_tensor_param(base_sync_done=True)
    with pytest.raises(HostError, match="delta_sharded"):
        actor.get_per_tensor_param_delta_shard()


def test_moments_leave_and_come_back(base):
    actor, _ = engines(base, actor={"engine": {"optimizer_offload": True}})
    assert actor.is_optimizer_offload_enabled
    assert not actor.is_param_offload_enabled
    steps((actor, _), 1)
    actor.to("cpu", model=False, optimizer=True, grad=False)
    with pytest.raises(HostError, match="would move the base"):
        actor.to("cuda", model=True, optimizer=False, grad=False)


def test_training_starts_from_what_hydra_ppo_sft_left(base, tmp_path):
    """Reference, actor and critic start there, the critic as the reward model."""
    sft = HydraModel.from_pretrained(base, train="sft", dtype="fp32")
    with torch.no_grad():
        for parameter in sft.role_parameters("reward").values():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    sft.reward_head_trained = True
    sft.save_pretrained(tmp_path / "sft")
    model = {"lora_rank": 16, "lora_adapter_path": str(tmp_path / "sft")}
    actor, critic = engines(base, random=False, actor={"model": model})
    data = batch(temperature=1.0)
    with actor.disable_adapter():
        reference = actor.infer_batch(data)["model_output"]["log_probs"].values()
    assert torch.equal(reference, actor.infer_batch(batch(temperature=1.0))["model_output"]["log_probs"].values())
    assert critic.infer_batch(batch())["model_output"]["values"].values().abs().max() > 0
    del actor, critic
    with pytest.raises(HostError, match="lora_rank=4 is not the rank of the adapter"):
        engines(base, actor={"model": model | {"lora_rank": 4}})


def test_a_base_in_nf4(base):
    extra = {"model": {"lora": {"hydra": {"quantization": "nf4"}}}}
    actor, critic = engines(base, actor=extra)
    before = actor.infer_batch(batch())["model_output"]["log_probs"].values()
    steps((actor, critic), 1)
    assert not torch.equal(actor.infer_batch(batch())["model_output"]["log_probs"].values(), before)
    with pytest.raises(HostError, match="held in nf4"):
        actor.get_per_tensor_param(base_sync_done=False)


def test_a_base_in_fp16_scales_its_losses(base):
    """As verl's engine does; the same gradients, as exact as fp16 is."""
    norms = {}
    for kind in ("fp32", "fp16"):
        changes = {"engine": {"mixed_precision": {"param_dtype": kind}}}
        actor, critic = engines(base, actor=changes, critic=changes)
        assert actor.scaler.get_scale() == (65536.0 if kind == "fp16" else 1.0)
        before = [p.clone() for p in actor.parameters]
        with actor.train_mode():
            norms[kind] = actor.train_batch(batch(), loss_function=actor_loss(0.01))["metrics"]["grad_norm"]
        assert any(not torch.equal(p, q) for p, q in zip(actor.parameters, before, strict=True))
        del actor, critic
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)


def test_one_more_engine_is_the_reference(base):
    actor, _ = engines(base)
    reference = make(base, engine={"forward_only": True})
    reference.initialize()
    found = reference.infer_batch(batch(temperature=1.0))["model_output"]["log_probs"].values()
    with actor.disable_adapter():
        expected = actor.infer_batch(batch(temperature=1.0))["model_output"]["log_probs"].values()
    assert torch.equal(found, expected)
    assert reference.stand() is actor.stand()


# -- what is refused -------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"model": {"lora_rank": 0}}, "actor_rollout_ref.model.lora_rank=0 would train the base itself"),
    ({"model": {"use_fused_kernels": True}}, "actor_rollout_ref.model.use_fused_kernels=True"),
    ({"model": {"use_liger": True}}, "actor_rollout_ref.model.use_liger=True"),
    ({"model": {"exclude_modules": "q_proj"}}, "actor_rollout_ref.model.exclude_modules='q_proj'"),
    ({"model": {"lora": {"rank": 8}}}, "actor_rollout_ref.model.lora.rank=8"),
    ({"model": {"lora": {"merge": True}}}, "actor_rollout_ref.model.lora.merge=True"),
    ({"model": {"lora": {"hydra": {"bits": 4}}}}, "actor_rollout_ref.model.lora.hydra.bits is not a setting"),
    ({"model": {"tiled_mlp": {"enabled": True}}}, "actor_rollout_ref.model.tiled_mlp.enabled=True"),
    ({"model": {"override_config": {"rope_theta": 5.0}}}, "actor_rollout_ref.model.override_config.rope_theta"),
    ({"engine": {"param_offload": True}}, "actor_rollout_ref.actor.fsdp_config.param_offload=True"),
    ({"engine": {"offload_policy": True}}, "actor_rollout_ref.actor.fsdp_config.offload_policy=True"),
    ({"engine": {"ulysses_sequence_parallel_size": 2}}, "fsdp_config.ulysses_sequence_parallel_size=2"),
    ({"engine": {"fsdp_size": 4}}, "fsdp_config.fsdp_size=4"),
    ({"engine": {"pad_to_length": True}}, "fsdp_config.pad_to_length=True"),
    ({"engine": {"mixed_precision": {"param_dtype": "fp8"}}}, "mixed_precision.param_dtype='fp8'"),
    (
        {"checkpoint": {"save_contents": ["model", "hf_model"]}},
        "actor_rollout_ref.actor.checkpoint.save_contents has 'hf_model'",
    ),
]


@pytest.mark.parametrize(("changes", "line"), REFUSED, ids=[line[:60] for _, line in REFUSED])
def test_what_does_not_go_together_is_refused(base, changes, line):
    with pytest.raises(HostError) as error:
        make(base, **changes)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_the_critic_stands_on_the_actors_base(base, tmp_path):
    critic = make(base, "critic")
    critic.initialize()
    with pytest.raises(HostError, match="finds no actor in this process"):
        critic.infer_batch(batch())
    actor, _ = engines(base)
    with pytest.raises(HostError, match="asked for twice"):
        make(base).initialize()
    with pytest.raises(HostError, match="initialize was called again"):
        actor.initialize()
    for changes, line in (
        ({"model": {"lora_rank": 8}}, "critic.model.lora_rank=8 is not 4"),
        ({"model": {"use_remove_padding": False}}, "critic.model.use_remove_padding=False is not True"),
        ({"engine": {"mixed_precision": None}}, "critic.fsdp.mixed_precision.param_dtype='bf16' is not 'fp32'"),
    ):
        with pytest.raises(HostError, match=line):
            make(base, "critic", **changes).stand()
    with pytest.raises(HostError, match=r"critic.model.lora_adapter_path"):
        make(base, "critic", model={"lora_adapter_path": "elsewhere"})
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(other)
    with pytest.raises(HostError, match=r"critic.model.path='.*other' is not '.*base'"):
        make(other, "critic").stand()
    with pytest.raises(HostError, match="no_lora_adapter=True was asked of the critic"), _.disable_adapter():
        pass


@pytest.mark.parametrize("wish", ["calculate_sum_pi_squared", "distillation_use_topk", "distillation_only"])
def test_what_a_batch_cannot_have_is_refused(base, wish):
    actor, _ = engines(base)
    with pytest.raises(HostError, match=f"{wish}=True"):
        actor.infer_batch(batch(**{wish: True}))
    with pytest.raises(HostError, match="temperature=0"):
        actor.infer_batch(batch(temperature=0.0))


def test_verl_finds_the_engine_without_a_line_of_code(base):
    code = "import verl; from verl.workers.engine import EngineRegistry as E; print(E.get_engine_cls('value_model', 'hydra'))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert "hydra_ppo.patches.verl_engine.HydraCritic" in done.stdout, done.stderr
    code = "import verl, sys; print('verl.workers.engine' in sys.modules, 'hydra_ppo.model.hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split()[-2:] == ["False", "False"], done.stdout + done.stderr  # the others pay nothing for it


def test_verls_own_defaults_and_two_words_are_enough(base):
    """The settings of `python -m verl.trainer.main_ppo` as its trainer reads them: nothing of them is refused."""
    import verl.trainer
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    words = ["actor_rollout_ref.actor.strategy=hydra", "critic.strategy=hydra"]
    words += [f"actor_rollout_ref.model.path={base}", f"critic.model.path={base}", "actor_rollout_ref.model.lora_rank=4"]
    words += [f"{place}.ppo_micro_batch_size_per_gpu=2" for place in ("actor_rollout_ref.actor", "critic")]
    words += [f"+{place}.model.load_tokenizer=False" for place in ("actor_rollout_ref", "critic")]  # the base has none
    with initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        config = compose("ppo_trainer", words)
    critic = omega_conf_to_dataclass(config.critic)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    found = {}
    for kind, role, model in (
        ("value_model", critic, critic.model),
        ("language_model", actor, omega_conf_to_dataclass(config.actor_rollout_ref.model)),
    ):
        found[kind] = EngineRegistry.new(
            model_type=kind,
            backend=role.engine.strategy,
            model_config=model,
            engine_config=role.engine,
            optimizer_config=role.optim,
            checkpoint_config=role.checkpoint,
        )
        found[kind].initialize()
    assert [type(engine).__name__ for engine in found.values()] == ["HydraCritic", "HydraEngine"]
    engine = found["language_model"]
    assert engine.stand() is found["value_model"].stand()
    assert engine.stand().causal_lm.dtype == torch.bfloat16
    assert engine.stand().checkpointing
    with engine.train_mode():
        norm = engine.train_batch(batch(temperature=1.0), loss_function=partial(ppo_loss, config=actor))["metrics"]["grad_norm"]
    assert 0 < norm < 100


# -- two processes ---------------------------------------------------------------------------------------------------------


def train_part(rank: int, world: int, base: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    pair = engines(base, random=False)  # drawn by each rank for itself
    rows = range(rank, 6, world)
    norms = []
    for _ in range(3):
        for engine, loss in zip(pair, (actor_loss(0.01), critic_loss()), strict=True):
            with engine.train_mode():
                norms.append(engine.train_batch(batch(rows), loss_function=loss)["metrics"]["grad_norm"])
    pair[0].save_checkpoint(str(folder / "actor"))
    pair[1].save_checkpoint(str(folder / "critic"))
    pair[0].load_checkpoint(str(folder / "actor"))
    found = {n: p for role in ("actor", "critic") for n, p in pair[0].stand().role_parameters(role).items()}
    torch.save((found, norms, sorted(p.name for p in (folder / "actor").iterdir())), folder / f"{rank}.pt")
    dist.destroy_process_group()


def seeded(rank: int, world: int, base: Path, folder: Path) -> None:
    torch.manual_seed(11 + 100 * rank)  # ranks draw different adapters, and rank 0's count
    train_part(rank, world, base, folder)


def test_two_processes_train_as_one(base, tmp_path):
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        mp.spawn(seeded, (world, base, folder), nprocs=world)
        found[world] = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    (alone, norms, _), (first, others, files), (second, _, _) = *found[1], *found[2]
    assert all(torch.equal(first[name], second[name]) for name in first)
    off = max((first[name] - alone[name]).abs().max().item() for name in alone)
    print(f"two processes against one, after 3 steps of each role: {off:.1e}; norms {norms[0]:.6f} and {others[0]:.6f}")
    assert off < 2e-5  # AdamW at LR divides small gradients by their size
    assert norms == pytest.approx(others, rel=1e-5)
    assert files == ["hydra", "hydra_optimizer.safetensors", *(f"hydra_random_{rank}_of_2.safetensors" for rank in range(2))]
