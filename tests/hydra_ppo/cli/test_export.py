"""What leaves the house: plain transformers says of an export what this program says of the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from hydra_ppo.cli.export import copy_tokenizer, export_role
from hydra_ppo.cli.main import main
from hydra_ppo.errors import ConfigError, UnsupportedModelError
from hydra_ppo.experience import Experience
from hydra_ppo.model.for_others import config_for_both_versions, save_for_others
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.rewards.classifier import Classifier
from hydra_ppo.rollout.scoring import reward_scores
from hydra_ppo.runs.contents import TOKENIZER_FILES
from tests.families import FAMILIES, randomise
from tests.training import WORDS, llama

SCORE_TOLERANCE = 1e-5
LOGPROB_TOLERANCE = 1e-3
EOS = 2
TEXTS = 64
SMALL = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = ("<bos>", "<eos>", "<unk>")


def words(pad: str | None = "<pad>", extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Words as tokens: `pad` or a plain one 0, <bos> 1, <eos> 2, <unk> 3, w0 to w27."""
    first = "<pad>" if pad == "<pad>" else "zero"
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([first, *SPECIAL, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos, eos, unk = SPECIAL
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk)
    if extra:
        made.add_special_tokens({"additional_special_tokens": list(extra)})
    return made


def write_run(
    folder: Path,
    config: PretrainedConfig,
    tokens: PreTrainedTokenizerFast,
    *,
    quantization: str | None = None,
    end_ids: tuple[int, ...] = (EOS,),
    trained: bool = True,
) -> HydraModel:
    """Write a base, an sft run on it and a ppo run on that, with adapters and heads that do something; return the last."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    model = None
    for name, source, stage in (("sft", "base", "sft"), ("ppo", "sft", "ppo")):
        model = HydraModel.from_pretrained(folder / source, train=stage, quantization=quantization)
        randomise(model, seed=len(name + stage))
        model.reward_head_trained = trained
        model.trained_end = end_ids[0]
        model.causal_lm.generation_config.eos_token_id = list(end_ids)
        model.save_pretrained(folder / name)
        tokens.save_pretrained(folder / name)
    assert model is not None
    return model


def drop(path: Path, part: str) -> None:
    save_file({k: v for k, v in load_file(path).items() if part not in k}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("file", "part", "says"),
    [
        ("base/model.safetensors", "lm_head", r"its base '.*base' lacks weight lm_head\.weight of the model"),
        ("ppo/actor/adapter_model.safetensors", ".layers.1.", r"adapter '.*actor' lacks 14 tensors"),
    ],
    ids=["base", "adapter"],
)
def test_what_lacks_weights_is_not_exported(file, part, says, tmp_path):
    write_run(tmp_path, llama(tie_word_embeddings=False), words())
    manifest = json.loads((tmp_path / "ppo/hydra.json").read_text())
    del manifest["base"]["weights"]  # the digest would tell that the base has changed
    (tmp_path / "ppo/hydra.json").write_text(json.dumps(manifest))
    drop(tmp_path / file, part)
    with pytest.raises(ConfigError, match=says):
        export_role(tmp_path / "ppo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_adapter_names_the_base_where_it_lies_now(tmp_path):
    write_run(tmp_path / "old", llama(), words(), quantization="nf4")
    shutil.move(tmp_path / "old", tmp_path / "new")
    for role in ("actor", "reward"):
        notes = export_role(tmp_path / "new/ppo", tmp_path / role, role=role, adapter_only=True)
        settings = json.loads((tmp_path / role / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tmp_path / "new/base")
        assert "trained over a base held as nf4: over another, or the unquantised one, it says something else" in notes


def rows(count: int = TEXTS) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of 1 to 10 words each; prompts hold ends too, and every response ends in one."""
    draw = torch.Generator().manual_seed(3)

    def ids(low: int) -> list[int]:
        length = int(torch.randint(low, 11, (), generator=draw))
        return torch.randint(4, 32, (length,), generator=draw).tolist()

    prompts = [[*ids(1), EOS, *ids(1)] if i % 3 == 0 else ids(1) for i in range(count)]
    return prompts, [[*ids(0), EOS] for _ in range(count)]


def in_words(tokens: PreTrainedTokenizerFast, prompts: list[list[int]], responses: list[list[int]]) -> list[str]:
    return [" ".join(tokens.convert_ids_to_tokens([*p, *r])) for p, r in zip(prompts, responses, strict=True)]


@torch.no_grad()
def classified(model, tokens, texts: list[str]) -> tuple[list[float], list[float]]:
    """What a classifier says of texts, one by one, and eight at a time with padding."""

    def logits(batch: list[str]) -> list[float]:
        inputs = tokens(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
        return model(**inputs).logits[:, 0].tolist()

    single = [logits([text])[0] for text in texts]
    return single, [score for start in range(0, len(texts), 8) for score in logits(texts[start : start + 8])]


def assert_same_scores(found: tuple[list[float], list[float]], expected: list[float]) -> None:
    assert max(expected) - min(expected) > 0.1
    for scores in found:
        assert max(abs(a - b) for a, b in zip(scores, expected, strict=True)) < SCORE_TOLERANCE


class TestClassifier:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_scores_are_ours(self, family, tmp_path, capsys):
        model = write_run(tmp_path, FAMILIES[family], words())
        prompts, responses = rows()
        expected = reward_scores(model, prompts, responses, [EOS], pad_id=0)
        assert main(["export", str(tmp_path / "ppo"), "--role", "reward", "--output", str(tmp_path / "out")]) == 0
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        tokens = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
        assert (plain.config.num_labels, plain.config.problem_type, plain.config.id2label) == (1, "regression", {0: "reward"})
        assert_same_scores(classified(plain, tokens, in_words(words(), prompts, responses)), expected)
        said = capsys.readouterr().out
        assert "a text is to end in <eos> (2), where the reward was trained" in said
        same = AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2").input_ids == [5, 6]
        assert ("cuts texts into other tokens than the run's" not in said) == same

    @pytest.mark.parametrize(
        ("pad", "extra", "found"),
        [
            ("<pad>", (), "<pad>"),
            ("<eos>", ("<|reserved_0|>",), "<|reserved_0|>"),  # the end of every answer, as many a Llama is trained
            ("<bos>", (), "<pad>"),
            ("<unk>", (), "<pad>"),
            (None, (), "<pad>"),
            (None, ("<think>",), "<pad>"),  # a token with a purpose is no padding
        ],
    )
    @pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
    def test_pads_with_what_no_text_ends_in(self, family, pad, extra, found, tmp_path):
        tokens = words(pad, extra)
        config = type(FAMILIES[family])(**FAMILIES[family].to_dict() | {"vocab_size": len(tokens), "pad_token_id": None})
        model = write_run(tmp_path, config, tokens)
        prompts, responses = rows()
        expected = reward_scores(model, prompts, responses, [EOS], pad_id=0)
        notes = export_role(tmp_path / "ppo", tmp_path / "out", role="reward")
        assert any("pad with" in note for note in notes) == (found != pad)
        exported = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert (exported.pad_token, exported.padding_side) == (found, "right")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert plain.config.pad_token_id == exported.pad_token_id
        assert_same_scores(classified(plain, exported, in_words(tokens, prompts, responses)), expected)

    def test_the_critic_says_what_a_text_so_far_is_worth(self, tmp_path):
        model = write_run(tmp_path, llama(), words())
        prompts, responses = rows(8)
        sequences = Experience.from_lists(prompts, responses, 0, torch.device("cpu")).sequences()
        with torch.no_grad(), model.role("critic"):
            values = model.values(sequences)
        export_role(tmp_path / "ppo", tmp_path / "out", role="critic")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            for step in range(len(response)):
                with torch.no_grad():
                    found = plain(input_ids=torch.tensor([[*prompt, *response[:step]]])).logits.item()
                assert found == pytest.approx(values[row, step].item(), abs=SCORE_TOLERANCE)

    @pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3"])
    def test_adapter_alone(self, family, tmp_path, capsys):
        model = write_run(tmp_path, FAMILIES[family], words())
        prompts, responses = rows()
        expected = reward_scores(model, prompts, responses, [EOS], pad_id=0)
        command = ["export", str(tmp_path / "ppo"), "--role", "reward", "--adapter-only", "--output", str(tmp_path / "out")]
        assert main(command) == 0
        assert "num_labels=1, pad_token_id=0)" in capsys.readouterr().out
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=0)
        plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
        tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert_same_scores(classified(plain, tokens, in_words(tokens, prompts, responses)), expected)

    def test_adapter_alone_without_a_token_to_pad_with_is_refused(self, tmp_path):
        write_run(tmp_path, llama(), words("<eos>"))
        with pytest.raises(ConfigError, match=r"pads with <eos>, which also begins or ends texts, .* which adds one"):
            export_role(tmp_path / "ppo", tmp_path / "out", role="reward", adapter_only=True)

    def test_as_a_reward_source_it_says_what_the_head_says(self, tmp_path):
        model = write_run(tmp_path, llama(), words("<eos>"))
        prompts, responses = rows()
        expected = reward_scores(model, prompts, responses, [EOS], pad_id=0)
        export_role(tmp_path / "ppo", tmp_path / "out", role="reward")
        tokens = words("<eos>")
        texts = [" ".join(tokens.convert_ids_to_tokens(prompt)) for prompt in prompts]
        answers = [" " + " ".join(tokens.convert_ids_to_tokens(response[:-1])) for response in responses]
        found = Classifier(str(tmp_path / "out"), torch.device("cpu"))(texts, answers)
        assert found == pytest.approx(expected, abs=SCORE_TOLERANCE)

    def test_of_a_quantised_run_says_so(self, tmp_path):
        write_run(tmp_path, llama(), words(), quantization="nf4")
        (tmp_path / "ppo" / "config.yaml").write_text("model: {name_or_path: x, quantization: nf4}\n")
        notes = export_role(tmp_path / "ppo", tmp_path / "out", role="reward")
        assert any("held as nf4, written over the unquantised one: scores differ" in note for note in notes)

    def test_types(self, tmp_path):
        torch.manual_seed(0)
        write_run(tmp_path, llama(), words())
        export_role(tmp_path / "ppo", tmp_path / "half", role="reward", dtype="bf16")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half", dtype="auto")
        assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}

    def test_what_was_not_trained_or_is_not_there_is_refused(self, tmp_path):
        write_run(tmp_path, llama(), words(), trained=False)
        with pytest.raises(ConfigError, match=r"role='reward' of run=.* was never trained"):
            export_role(tmp_path / "ppo", tmp_path / "out", role="reward")
        with pytest.raises(ConfigError, match=r"role='critic' is not in run=.*, which holds reference, reward"):
            export_role(tmp_path / "sft", tmp_path / "out", role="critic")
        for name in TOKENIZER_FILES:
            (tmp_path / "ppo" / name).unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=r"holds no tokenizer, which says where a classifier reads"):
            export_role(tmp_path / "ppo", tmp_path / "out", role="critic")
        assert not (tmp_path / "out").exists()

    def test_a_family_without_a_classifier_is_refused(self, tmp_path):
        from transformers import CohereConfig

        shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        write_run(tmp_path, CohereConfig(vocab_size=64, logit_scale=1.0, **shape), words())
        with pytest.raises(UnsupportedModelError, match=r"CohereForCausalLM cannot leave as a classifier: transformers has no"):
            export_role(tmp_path / "ppo", tmp_path / "out", role="reward")


class TestActor:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_log_probs_are_ours(self, family, tmp_path):
        model = write_run(tmp_path, FAMILIES[family], words())
        prompts, responses = rows(16)
        sequences = Experience.from_lists(prompts, responses, 0, torch.device("cpu")).sequences()
        with torch.no_grad(), model.role("actor"):
            expected = model.logprobs(sequences).logprobs
        export_role(tmp_path / "ppo", tmp_path / "out")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
            logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
            found = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(found, expected[row, : len(response)], rtol=0, atol=LOGPROB_TOLERANCE)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
    def test_plain_generate_stops_where_answers_end(self, family, tmp_path):
        if family not in FAMILIES:
            pytest.fail(f"{family} is unknown to this transformers")
        turn = 7  # not the tokenizer's eos, which ends an answer too
        write_run(tmp_path, FAMILIES[family], words(), end_ids=(turn, EOS))
        export_role(tmp_path / "ppo", tmp_path / "out")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert plain.generation_config.eos_token_id == [turn, EOS]
        torch.manual_seed(0)
        prompt = torch.tensor([[4, 5, 6]] * 64)
        with torch.no_grad():
            answers = plain.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, max_new_tokens=50, pad_token_id=0
            )[:, 3:]
        ended = set()
        for answer in answers.tolist():
            stop = next((i for i, token in enumerate(answer) if token in (turn, EOS)), None)
            if stop is not None:
                ended.add(answer[stop])
                assert set(answer[stop + 1 :]) <= {0}
        assert ended == {turn, EOS}

    def test_of_an_sft_run_is_its_policy(self, tmp_path):
        write_run(tmp_path, llama(), words())
        model = HydraModel.from_pretrained(tmp_path / "sft", train="sft")
        export_role(tmp_path / "sft", tmp_path / "out")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad(), model.role("reference"):
            expected = model.architecture.output_embeddings(model.hidden_states(ids))
            torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)

    def test_settings_of_the_base_that_contradict_each_other_do_not_stop_it(self, tmp_path):
        write_run(tmp_path, llama(), words())
        settings = tmp_path / "base" / "generation_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"temperature": 0.7}))
        export_role(tmp_path / "ppo", tmp_path / "out")
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [EOS]

    def test_adapter_alone_says_where_its_base_would_not_stop(self, tmp_path):
        write_run(tmp_path, llama(), words(), end_ids=(7, EOS))
        note, wrote = export_role(tmp_path / "ppo", tmp_path / "out", adapter_only=True)
        base, out = str(tmp_path / "base"), str(tmp_path / "out")
        assert wrote.endswith(f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {out!r})")
        assert note == "answers end at token 7, the base's own settings stop at 2: generate with eos_token_id=[7, 2]"

    def test_of_a_checkpoint_takes_the_tokenizer_of_its_run(self, tmp_path):
        write_run(tmp_path, llama(), words())
        inside = tmp_path / "ppo" / "checkpoints" / "step-000002"
        shutil.copytree(tmp_path / "ppo", inside, ignore=shutil.ignore_patterns("checkpoints", "token*"))
        manifest = json.loads((inside / "hydra.json").read_text())
        manifest["base"]["name_or_path"] = "../../../base"
        (inside / "hydra.json").write_text(json.dumps(manifest))
        export_role(inside, tmp_path / "out")
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == words().get_vocab()

    def test_of_a_run_whose_base_is_not_there_the_adapter_can_be_had(self, tmp_path):
        for role in ("actor", "reward"):
            write_run(tmp_path / role, llama(), words())
            shutil.move(tmp_path / role / "ppo", tmp_path / f"{role}-alone")
            notes = export_role(tmp_path / f"{role}-alone", tmp_path / f"{role}-out", role=role, adapter_only=True)
            was = str(tmp_path / role / "base")
            assert f"the base is not where the run expects it; the adapter names {was!r}, where it was trained" in notes
            config = json.loads((tmp_path / f"{role}-out/adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == was
            with pytest.raises(ConfigError, match="needs its base at"):
                export_role(tmp_path / f"{role}-alone", tmp_path / "whole", role=role)

    def test_on_a_base_that_is_stored_quantised(self, tmp_path):
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(llama())
        plain.save_pretrained(tmp_path / "plain")
        stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=stored).save_pretrained(tmp_path / "base")
        model = HydraModel.from_pretrained(tmp_path / "base")
        randomise(model, seed=1)
        model.save_pretrained(tmp_path / "ppo")
        words().save_pretrained(tmp_path / "ppo")
        notes = export_role(tmp_path / "ppo", tmp_path / "out")
        assert "the base is stored as nf4: written are the weights that it stands for, unpacked" in notes
        out = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert not hasattr(out.config, "quantization_config")
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad(), model.role("actor"):
            expected = model.architecture.output_embeddings(model.hidden_states(ids))
            torch.testing.assert_close(out(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)

    def test_nothing_half_made_is_left(self, tmp_path, monkeypatch):
        write_run(tmp_path, llama(), words())

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("hydra_ppo.cli.export.copy_tokenizer", full)
        with pytest.raises(ConfigError, match=r"output='.*out' cannot be written \(No space left on device\)"):
            export_role(tmp_path / "ppo", tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ppo", "sft"]


class TestOlderReaders:
    """transformers 4 has other names for how positions are turned; without them it takes a default, and says nothing."""

    def config(self, kind: type[PretrainedConfig], rope: dict, folder: Path, **more) -> dict:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**SMALL, **more, rope_parameters=rope)).eval()
        assert save_for_others(model, folder) == []
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.arange(3, 19)[None]
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)  # what was added changes nothing here
        return json.loads((folder / "config.json").read_text())

    def test_plain(self, tmp_path):
        found = self.config(LlamaConfig, {"rope_theta": 500.0, "rope_type": "default"}, tmp_path)
        assert (found["rope_theta"], found.get("rope_scaling"), found["torch_dtype"]) == (500.0, None, "float32")

    def test_stretched(self, tmp_path):
        scaling = {"rope_type": "linear", "factor": 4.0}
        found = self.config(LlamaConfig, {"rope_theta": 500.0, **scaling}, tmp_path)
        assert (found["rope_theta"], found["rope_scaling"]) == (500.0, scaling)

    def test_names_of_its_own(self, tmp_path):
        rope = {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5}
        found = self.config(GPTNeoXConfig, rope, tmp_path)
        assert (found["rotary_emb_base"], found["rotary_pct"]) == (500.0, 0.5)

    def test_by_kind_of_layer(self, tmp_path):
        full, sliding = ({"rope_type": "default", "rope_theta": theta} for theta in (1000.0, 77.0))
        rope = {"full_attention": full, "sliding_attention": sliding}
        found = self.config(Gemma3TextConfig, rope, tmp_path, head_dim=32, num_key_value_heads=2)
        assert (found["rope_theta"], found["rope_local_base_freq"]) == (1000.0, 77.0)

    def test_what_has_no_older_name_is_said(self, tmp_path):
        config = {"model_type": "other", "rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (line,) = config_for_both_versions(tmp_path)
        assert line.startswith("config.json of other says how positions are turned by kinds of layers")


class TestTokenizerFiles:
    @pytest.mark.parametrize("templates", [None, "{{ messages }}", {"default": "{{ messages }}", "tool_use": "{{ tools }}"}])
    def test_all_that_is_written_is_copied(self, templates, tmp_path):
        made = words()
        made.chat_template = templates
        made.save_pretrained(tmp_path / "saved")
        (tmp_path / "copy").mkdir()
        copy_tokenizer(tmp_path / "saved", tmp_path / "copy")
        files = [{p.relative_to(f) for p in f.rglob("*")} for f in (tmp_path / "saved", tmp_path / "copy")]
        assert files[0] == files[1]
        assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == templates

    def test_the_names_of_every_vocabulary_are_known(self):
        import transformers

        found = set()
        for path in Path(transformers.__file__).parent.rglob("tokenization_*.py"):
            for block in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), flags=re.S):
                found |= set(re.findall(r': "(.*?)"', block))
        assert len(found) > 5
        assert found <= set(TOKENIZER_FILES)
