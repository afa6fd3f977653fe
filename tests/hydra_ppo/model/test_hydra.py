"""HydraModel: roles, gradient ownership, checkpointing, saving, and what is refused."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, T5Config, XLNetConfig

from hydra_ppo.compute.flash import FLASH
from hydra_ppo.compute.packing import packing_attention
from hydra_ppo.compute.recompute import enable_recompute
from hydra_ppo.config.settings import LoraSettings
from hydra_ppo.errors import ConfigError, RoleError, UnsupportedModelError
from hydra_ppo.experience import Experience
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.model.loading import resolve_attention
from hydra_ppo.rollout.decoder import decoding_attention
from tests.allocations import LargestAllocation
from tests.families import FAMILIES, experience, randomise, sequences
from tests.training import hydra, llama, write_model

EXACT = {"rtol": 0.0, "atol": 0.0}


def all_roles(model: HydraModel) -> dict[str, torch.Tensor]:
    """What each role says about the same sequences."""
    batch = experience()
    found = {}
    with torch.no_grad():
        for role in model.roles:
            with model.role(role):
                if model.roles[role].head == "lm":
                    found[role] = model.logprobs(batch.sequences()).logprobs * batch.response_mask
                else:
                    found[role] = model.values(batch.sequences()) * batch.response_mask
        found["scores"] = model.reference_and_reward(batch.sequences())[1]
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **EXACT)


@pytest.fixture
def model() -> HydraModel:
    made = hydra(vocab_size=64)
    randomise(made)
    return made


class TestRoles:
    def test_nest_and_come_back(self, model):
        assert model.current_role is None
        with model.role("critic"):
            with model.role("reference"):
                assert model.adapters.active is None
                assert model.current_role == "reference"
            assert model.adapters.active == "critic"
        assert model.current_role is None
        assert model.adapters.active is None

    def test_come_back_after_an_exception(self, model):
        with pytest.raises(ZeroDivisionError), model.role("actor"), model.role("critic"):
            raise ZeroDivisionError
        assert model.adapters.active is None

    def test_move_and_copy_no_weight(self, model):
        before = {n: p.data_ptr() for n, p in model.named_parameters()}
        all_roles(model)
        assert before == {n: p.data_ptr() for n, p in model.named_parameters()}

    def test_give_the_same_numbers_again_and_in_both_modes(self, model):
        first = all_roles(model)
        assert_same(all_roles(model.train()), first)
        assert_same(all_roles(model.eval()), first)

    @pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
    def test_give_the_same_numbers_on_a_quantised_base_in_any_order_of_modes(self, quantization):
        model = hydra(vocab_size=64, quantization=quantization)
        randomise(model)
        model.train()
        first = all_roles(model)
        assert_same(all_roles(model.eval()), first)
        with torch.no_grad(), model.role("actor"):
            model.hidden_states(torch.tensor([[5]]))  # one token: the kernel that repacks
        assert_same(all_roles(model), first)
        assert_same(all_roles(model.train()), first)

    def test_a_head_that_the_role_lacks_is_refused(self, model):
        with pytest.raises(RoleError, match=r"role='critic' has no lm head"), model.role("critic"):
            model.logprobs(sequences())
        with pytest.raises(RoleError, match="role=None has no value or reward head"):
            model.values(sequences())
        with (
            pytest.raises(RoleError, match="role='judge' does not exist at stage 'ppo'; choose among actor, critic"),
            model.role("judge"),
        ):
            pass


class TestGradients:
    def test_no_role_switch_changes_requires_grad(self, model):
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        all_roles(model)
        assert before == {n: p.requires_grad for n, p in model.named_parameters()}
        trainable = {n for n, grad in before.items() if grad}
        assert all(".actor." in n or ".critic." in n or n == "heads.value.weight" for n in trainable)

    def test_role_parameters_are_the_trainable_ones_each_once(self, model):
        actor, critic = model.role_parameters("actor"), model.role_parameters("critic")
        ids = [id(p) for p in (*actor.values(), *critic.values())]
        assert len(ids) == len(set(ids))
        assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}

    def test_checkpointing_without_the_role_would_be_wrong(self, model):
        """Shows that the equivalence tests can fail: plain checkpointing recomputes under the last adapter."""

        model.packing = False  # whose attention would be lost too, which raises

        def gradients(role_aware: bool) -> torch.Tensor:
            model.train().enable_checkpointing()
            if not role_aware:
                enable_recompute(model.architecture.layers)
            model.zero_grad()
            with model.role("actor"):
                loss = model.logprobs(sequences()).logprobs.sum()
            with model.role("critic"):
                loss = loss + model.values(sequences()).sum()
                loss.backward()
            return torch.cat([p.grad.flatten() for p in model.role_parameters("actor").values() if p.grad is not None])

        right, naive = gradients(True), gradients(False)
        assert right.shape != naive.shape or (right - naive).abs().max() > 1e-3 * right.abs().max()

    def test_reentrant_checkpointing_is_refused(self, model):
        with pytest.raises(RoleError, match="use_reentrant=True cannot recompute a layer in its own role"):
            model.enable_checkpointing(use_reentrant=True)

    @pytest.mark.parametrize("training", [True, False])
    def test_checkpointing_saves_activations(self, training):
        from hydra_ppo.runtime.memory import LiveBytes

        def peak(enabled: bool) -> int:
            model = hydra(num_hidden_layers=6, vocab_size=64)
            model.train(training).enable_checkpointing(enabled)
            ids = [list(range(4, 24))] * 8
            batch = Experience.from_lists(ids, ids, 0, torch.device("cpu")).sequences()
            with LiveBytes(model.parameters()) as live, model.role("actor"):
                model.logprobs(batch).logprobs.sum().backward()
            return live.peak - sum(p.numel() * 4 for p in model.parameters())

        assert peak(True) < 0.6 * peak(False)

    def test_the_trunk_has_no_adapters_and_no_gradients(self):
        model = hydra(num_hidden_layers=4, trunk_layers=2, vocab_size=64)
        layers = {int(n.split(".layers.")[1].split(".")[0]) for n in model.role_parameters("actor")}
        assert layers == {2, 3}


class TestMemoryRules:
    @pytest.mark.parametrize("family", sorted(FAMILIES.keys() & {"llama", "gemma3-softcap"}))
    def test_no_tensor_of_size_b_t_v_and_no_t_by_t(self, family, monkeypatch):
        from hydra_ppo.compute import logprobs

        vocabulary, rows, length = 8192, 4, 96
        config = copy.deepcopy(FAMILIES[family])
        config.vocab_size, config.max_position_embeddings = vocabulary, 128
        model = HydraModel.from_config(config)
        model.train().enable_checkpointing()
        monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 4 * vocabulary * 8)
        ids = [list(range(10, 10 + length // 2))] * rows
        batch = Experience.from_lists(ids, ids, 0, torch.device("cpu")).sequences()
        with LargestAllocation() as largest:
            with model.role("actor"):
                model.logprobs(batch, entropy_grad=True).logprobs.sum().backward()
            with model.role("critic"):
                model.values(batch).sum().backward()
            model.reference_and_reward(batch)
        weights = vocabulary * 64  # the head itself, seen as an alias
        assert largest.elements <= weights
        assert weights < rows * (length // 2) * vocabulary

    def test_attention_makes_no_mask_and_no_scores(self):
        """A (B, 1, T, T) mask or (B, heads, T, T) scores would be the largest tensor at this shape."""
        length = 1024
        model = hydra(vocab_size=64, max_position_embeddings=2048)
        ids = [list(range(4, 36)) * (length // 64)] * 2
        batch = Experience.from_lists(ids, [ids[0], ids[0][:7]], 0, torch.device("cpu")).sequences()
        with LargestAllocation() as largest:
            with model.role("critic"):
                model.values(batch).sum().backward()
            model.reference_and_reward(batch)
        assert largest.elements < length * length


class TestSaving:
    def test_round_trip(self, tmp_path):
        base = write_model(tmp_path / "base", vocab_size=64)
        model = HydraModel.from_pretrained(base, lora=LoraSettings(r=4))
        randomise(model)
        model.save_pretrained(tmp_path / "run")
        loaded = HydraModel.from_pretrained(tmp_path / "run")
        assert_same(all_roles(loaded), all_roles(model))
        assert {p.name for p in (tmp_path / "run").iterdir()} == {"actor", "critic", "hydra.json", "heads.safetensors"}

    def test_folders_can_be_moved_together(self, tmp_path):
        model = HydraModel.from_pretrained(write_model(tmp_path / "a" / "base", vocab_size=64))
        randomise(model)
        model.save_pretrained(tmp_path / "a" / "run")
        expected = all_roles(model)
        (tmp_path / "a").rename(tmp_path / "b")
        assert_same(all_roles(HydraModel.from_pretrained(tmp_path / "b" / "run")), expected)

    @pytest.mark.parametrize("trunk_layers", [0, 1])
    def test_peft_loads_the_actor_without_this_package(self, tmp_path, trunk_layers):
        base = write_model(tmp_path / "base", vocab_size=64)
        model = HydraModel.from_pretrained(base, trunk_layers=trunk_layers)
        randomise(model)
        model.save_pretrained(tmp_path / "run")
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "actor").eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad(), model.role("actor"):
            expected = model.architecture.output_embeddings(model.hidden_states(ids))
            torch.testing.assert_close(plain(input_ids=ids).logits, expected)

    @pytest.mark.parametrize("quantization", [None, "nf4"])
    def test_ppo_starts_from_what_sft_left(self, tmp_path, quantization):
        base = write_model(tmp_path / "base", vocab_size=64)
        sft = HydraModel.from_pretrained(base, train="sft", quantization=quantization, lora=LoraSettings(r=4))
        randomise(sft)
        sft.reward_head_trained = True
        sft.save_pretrained(tmp_path / "sft")
        ppo = HydraModel.from_pretrained(tmp_path / "sft", quantization=quantization)
        found, before = all_roles(ppo), all_roles(sft)
        for role, source in (("reference", "reference"), ("actor", "reference"), ("reward", "reward"), ("critic", "reward")):
            torch.testing.assert_close(found[role], before[source], **EXACT)
        assert ppo.reward_head_trained
        assert ppo.base.peft_config["actor"].r == 4

    def test_a_separate_reward_adapter_is_the_reward_role(self, tmp_path):
        base = write_model(tmp_path / "base", vocab_size=64)
        sft = HydraModel.from_pretrained(base, train="sft")
        randomise(sft, seed=1)
        sft.save_pretrained(tmp_path / "sft")
        reward = HydraModel.from_pretrained(tmp_path / "sft", train="reward")
        torch.testing.assert_close(all_roles(reward)["reference"], all_roles(sft)["reference"], **EXACT)
        with torch.no_grad():
            for parameter in reward.role_parameters("reward").values():
                parameter.add_(0.05)
        reward.reward_head_trained = True
        reward.save_pretrained(tmp_path / "reward")
        ppo = HydraModel.from_pretrained(tmp_path / "reward")
        found, wanted = all_roles(ppo), all_roles(reward)
        for role, source in (("reference", "reference"), ("actor", "reference"), ("reward", "reward"), ("critic", "reward")):
            torch.testing.assert_close(found[role], wanted[source], **EXACT)
        torch.testing.assert_close(found["scores"], wanted["scores"], **EXACT)
        assert not torch.equal(found["reward"], all_roles(sft)["reward"])

    def test_a_tuned_base_is_saved_beside(self, tmp_path):
        model = HydraModel.from_pretrained(write_model(tmp_path / "base", vocab_size=64), train="base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        model.save_pretrained(tmp_path / "sft")
        ppo = HydraModel.from_pretrained(tmp_path / "sft")
        assert_same(
            {k: v for k, v in all_roles(ppo).items() if k in ("reference", "reward")},
            {k: v for k, v in all_roles(model).items() if k != "scores"},
        )
        assert ppo.roles["reference"].adapter is None

    def test_a_tuned_base_takes_the_trunk_that_is_asked_for_and_adapters_keep_theirs(self, tmp_path):
        base = write_model(tmp_path / "base", vocab_size=64)
        HydraModel.from_pretrained(base, train="base").save_pretrained(tmp_path / "full")
        assert HydraModel.from_pretrained(tmp_path / "full", trunk_layers=1).trunk_layers == 1
        HydraModel.from_pretrained(base, train="sft", trunk_layers=1).save_pretrained(tmp_path / "sft")
        assert HydraModel.from_pretrained(tmp_path / "sft").trunk_layers == 1
        HydraModel.from_pretrained(base, train="sft").save_pretrained(tmp_path / "whole")
        with pytest.raises(ConfigError, match=r"model.trunk_layers=1 differs from the 0 that the saved adapters"):
            HydraModel.from_pretrained(tmp_path / "whole", trunk_layers=1)

    def test_a_quantised_base_cannot_be_trained(self, tmp_path):
        with pytest.raises(ConfigError, match=r"model\.quantization='nf4' leaves no weights"):
            HydraModel.from_pretrained(write_model(tmp_path / "base"), train="base", quantization="nf4")

    def test_nothing_is_pickled(self, tmp_path):
        model = HydraModel.from_pretrained(write_model(tmp_path / "base", vocab_size=64))
        model.save_pretrained(tmp_path / "run")
        assert {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()} == {".json", ".safetensors"}
        adapter = tmp_path / "run" / "actor" / "adapter_model.safetensors"
        adapter.rename(adapter.with_name("adapter_model.bin"))
        with pytest.raises(ConfigError, match=r"run/actor' lacks adapter_model.safetensors"):
            HydraModel.from_pretrained(tmp_path / "run")

    def test_a_base_that_is_gone_is_named(self, tmp_path):
        base = write_model(tmp_path / "base", vocab_size=64)
        HydraModel.from_pretrained(base).save_pretrained(tmp_path / "run")
        base.rename(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match=r"needs its base at '../base' beside it; put it back there"):
            HydraModel.from_pretrained(tmp_path / "run")

    def test_adapters_of_another_base_are_refused(self, tmp_path):
        HydraModel.from_pretrained(write_model(tmp_path / "base", vocab_size=64)).save_pretrained(tmp_path / "run")
        write_model(tmp_path / "base", vocab_size=64, hidden_size=128)
        with pytest.raises(ConfigError, match=r"holds adapters of another base than .* put their own base back"):
            HydraModel.from_pretrained(tmp_path / "run")
        manifest = json.loads((tmp_path / "run" / "hydra.json").read_text())
        del manifest["base"]["weights"]  # as it was written before the weights were known by a digest
        (tmp_path / "run" / "hydra.json").write_text(json.dumps(manifest))
        with pytest.raises(ConfigError, match=r"does not fit this base .* load it on the base that it was trained on"):
            HydraModel.from_pretrained(tmp_path / "run")

    @pytest.mark.parametrize("damage", ["", "[]", "{}", "{not json"])
    def test_a_damaged_manifest_is_one_line(self, tmp_path, damage):
        HydraModel.from_pretrained(write_model(tmp_path / "base", vocab_size=64)).save_pretrained(tmp_path / "run")
        (tmp_path / "run" / "hydra.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"hydra.json .*; save the model again"):
            HydraModel.from_pretrained(tmp_path / "run")


class TestExport:
    @pytest.mark.parametrize("quantization", [None, "nf4"])
    def test_merged_actor_is_a_plain_model(self, tmp_path, quantization):
        from hydra_ppo.cli.export import export_role

        base = write_model(tmp_path / "base", vocab_size=64)
        model = HydraModel.from_pretrained(base, quantization=quantization)
        randomise(model)
        model.save_pretrained(tmp_path / "run")
        export_role(tmp_path / "run", tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert not any("lora" in name for name, _ in plain.named_parameters())
        whole = HydraModel.from_pretrained(tmp_path / "run")  # the unquantised base with the same adapter
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad(), whole.role("actor"):
            expected = whole.architecture.output_embeddings(whole.hidden_states(ids))
            torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)

    def test_adapter_alone(self, tmp_path):
        from hydra_ppo.cli.export import export_role

        model = HydraModel.from_pretrained(write_model(tmp_path / "base", vocab_size=64))
        model.save_pretrained(tmp_path / "run")
        export_role(tmp_path / "run", tmp_path / "adapter", adapter_only=True)
        assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        with pytest.raises(ConfigError, match="is not empty; choose another folder"):
            export_role(tmp_path / "run", tmp_path / "adapter")
        with pytest.raises(ConfigError, match=r"holds no hydra\.json"):
            export_role(tmp_path / "base", tmp_path / "new")


class TestRefused:
    def test_encoder_decoder(self):
        with pytest.raises(UnsupportedModelError):
            HydraModel.from_config(T5Config(d_model=16, num_layers=1, num_heads=2, vocab_size=32))

    def test_encoder(self):
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
        with pytest.raises(UnsupportedModelError, match="model=BertLMHeadModel: a token sees those after it"):
            HydraModel.from_config(config)

    def test_layers_that_are_not_the_decoders(self):
        causal_lm = AutoModelForCausalLM.from_config(llama(num_hidden_layers=2))
        causal_lm.model.spare = copy.deepcopy(causal_lm.model.layers)
        for layer in causal_lm.model.spare:  # as large as a tower beside the language model may be
            layer.more = torch.nn.Linear(64, 64)
        with pytest.raises(UnsupportedModelError, match="no gradient reaches adapter 'actor'"):
            HydraModel(causal_lm)
        causal_lm.model.layers, causal_lm.model.spare = torch.nn.ModuleList(), None
        with pytest.raises(UnsupportedModelError, match="no list of 2 decoder layers"):
            HydraModel(causal_lm)

    def test_a_model_that_sees_later_tokens(self):
        config = XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=16)
        with pytest.raises(UnsupportedModelError, match="model=XLNetLMHeadModel"):
            HydraModel(AutoModelForCausalLM.from_config(config))

    def test_logits_changed_after_the_head(self):
        causal_lm = AutoModelForCausalLM.from_config(llama())

        def bend(_module, _args, output):
            output.logits = output.logits + torch.arange(output.logits.shape[-1])
            return output

        causal_lm.register_forward_hook(bend)
        with pytest.raises(UnsupportedModelError, match="changes its logits after the output head"):
            HydraModel(causal_lm)

    @pytest.mark.parametrize(("config", "scale"), [("granite", 1 / 8), ("cohere", 0.25)])
    def test_logits_that_are_scaled_after_the_head(self, config, scale):
        from transformers import CohereConfig, GraniteConfig

        shape = llama().to_diff_dict()
        made = (
            GraniteConfig(**shape | {"logits_scaling": 8.0})
            if config == "granite"
            else CohereConfig(**shape, logit_scale=scale)
        )
        model = HydraModel.from_config(made)
        assert model.architecture.scale == scale
        ids = torch.tensor([[5, 6, 7]])
        hidden = model.hidden_states(ids)
        torch.testing.assert_close(model.architecture.lm_head().logits(hidden), model.causal_lm(input_ids=ids).logits)

    def test_cross_attention(self):
        config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
        assert HydraModel.from_config(config).roles  # plain GPT-2 is fine

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"lora": LoraConfig(lora_dropout=0.1)},
                "lora.lora_dropout=0.1 would add noise to the ratio of PPO; set lora_dropout=0",
            ),
            (
                {"lora": LoraConfig(target_modules=["nope"])},
                r"lora.target_modules=\['nope'\] are not linear layers .* choose among",
            ),
            ({"lora": LoraConfig(modules_to_save=["lm_head"])}, "modules_to_save"),
            (
                {"lora": LoraConfig(bias="all")},
                "lora.bias='all' would train biases of the base that all roles share; use bias='none'",
            ),
            ({"lora": LoraConfig(init_lora_weights="pissa")}, "lora.init_lora_weights='pissa' changes the base"),
            (
                {"lora": LoraConfig(init_lora_weights=False)},
                "lora.init_lora_weights=False changes the base .*, or gives the actor",
            ),
            ({"lora": LoraConfig(use_dora=True)}, "lora.use_dora=True rounds"),
            ({"lora": LoraConfig(layers_to_transform=[0])}, "is what trunk_layers sets; use trunk_layers"),
            ({"trunk_layers": 2}, "model.trunk_layers=2 must be at least 0 and below the 2 decoder layers"),
            ({"train": "both"}, "train='both' is not a stage"),
        ],
    )
    def test_settings_against_the_model(self, options, message):
        with pytest.raises(ConfigError, match=message):
            HydraModel.from_config(llama(), **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"attention": "flash_attention_2"}, r"model.attention='flash_attention_2' but .*; remove the obstacle or use"),
            ({"device": "gpu"}, "model.device='gpu' is not a device; use auto, cpu, cuda or cuda:N"),
            ({"dtype": "fp8"}, "model.dtype='fp8' is unknown; choose one of auto, fp32, bf16, fp16"),
        ],
    )
    def test_settings_against_the_machine(self, options, message):
        with pytest.raises(ConfigError, match=message):
            HydraModel.from_config(llama(), **options)

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(ConfigError, match=r"holds no config.json"):
            HydraModel.from_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"'no/such-model' cannot be loaded \(no folder of that name, and the hub\)"):
            HydraModel.from_pretrained("no/such-model")

    def test_pickled_weights(self, tmp_path):
        base = write_model(tmp_path / "base")
        (base / "model.safetensors").unlink()
        torch.save({}, base / "pytorch_model.bin")
        with pytest.raises(ConfigError, match=r"cannot be loaded .*safetensors"):
            HydraModel.from_pretrained(base)

    def test_remote_code_does_not_run_unasked(self, tmp_path):
        base = write_model(tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        marker = tmp_path / "ran"
        config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
        (base / "config.json").write_text(json.dumps(config))
        (base / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass Evil: pass\n")
        with pytest.raises((ConfigError, UnsupportedModelError)):
            HydraModel.from_pretrained(base)
        assert not Path(marker).exists()


def test_options_of_a_peft_config_are_kept():
    given = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, use_rslora=True)
    kept = HydraModel.from_config(llama(), lora=given).base.peft_config["critic"]
    assert (kept.r, kept.lora_alpha, kept.rank_pattern, kept.use_rslora) == (4, 4, {"v_proj": 2}, True)
    assert kept.target_modules == {"q_proj", "v_proj"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_adapters_and_heads_stay_in_fp32(dtype):
    model = HydraModel.from_config(llama(), dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.causal_lm.dtype != torch.float32


def test_checkpointing_that_a_model_came_with_is_switched_off():
    causal_lm = AutoModelForCausalLM.from_config(llama())
    causal_lm.gradient_checkpointing_enable({"use_reentrant": True})
    model = HydraModel(causal_lm)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model.enable_checkpointing()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_auto_attention_is_logged_where_there_is_a_choice(caplog, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "flash_attn" else find(name, *more))
    with caplog.at_level("INFO", logger="hydra_ppo"):
        HydraModel.from_config(llama())
        assert "attention" not in caplog.text  # on a CPU nobody can do anything about it
        resolve_attention("auto", torch.device("cuda"), torch.bfloat16)
    assert "attention=auto takes sdpa (the package flash-attn is not installed, nor is kernels)" in caplog.text


@pytest.mark.parametrize(
    ("failure", "chosen"),
    [
        (None, "flash_attention_2 (through kernels)"),
        (
            FileNotFoundError("no build\nof many"),
            "sdpa (the package flash-attn is not installed, kernels has none for this machine (FileNotFoundError: no build))",
        ),
    ],
)
def test_flash_attention_comes_from_kernels_where_the_package_is_not_there(failure, chosen, caplog, monkeypatch):
    """As transformers puts it in: asked for by the package's name, found under the kernel's."""
    asked = []

    def fetch(name):
        asked.append(name)
        if failure is not None:
            raise failure

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "flash_attn" else find(name, *more))
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("transformers.modeling_flash_attention_utils.lazy_import_flash_attention", fetch)
    with caplog.at_level("INFO", logger="hydra_ppo"):
        found = resolve_attention("auto", torch.device("cuda"), torch.bfloat16)
    assert f"attention=auto takes {chosen}" in caplog.text
    assert found == chosen.split()[0]
    assert asked == ["kernels-community/flash-attn2"]
    asked.clear()
    assert resolve_attention("auto", torch.device("cuda"), torch.float32) == "sdpa"
    assert resolve_attention("auto", torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert not asked  # nothing is fetched that could not be used


def test_a_model_with_the_kernel_packs_its_rows_and_samples_without_it():
    model = HydraModel.from_config(llama())
    config = model.architecture.config
    config._attn_implementation = FLASH[1]
    assert packing_attention(config, torch.device("cuda")) == FLASH[1]
    with decoding_attention(model):
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == FLASH[1]
