"""A classifier reads its own template, one begin token and its own end; its numbers are those of transformers, text by text."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hydra_ppo.config.settings import RewardSource
from hydra_ppo.data.formats import ChatText
from hydra_ppo.data.rows import load_prompts
from hydra_ppo.errors import ConfigError, RewardError
from hydra_ppo.rewards.classifier import Classifier
from hydra_ppo.rewards.responses import Responses
from hydra_ppo.rewards.scorer import check_source
from tests.hydra_ppo.test_data import BOS, CHATML, END, PAD, data, make_tokenizer, user
from tests.training import llama

CPU = torch.device("cpu")
TOLERANCE = 1e-5
BRACKETS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}"
STRICT = "{{ raise_exception('no more than one turn') }}"
WORDS = [f"w{i}" for i in range(28)]
CLS, SEP, BERT_PAD = 0, 2, 1


def bytes_llama(folder, template=None, special="<bos> {}", **changes):
    """A Llama over bytes; its tokenizer begins texts with <bos>."""
    torch.manual_seed(0)
    settings = {"vocab_size": 300, "num_labels": 1, "max_position_embeddings": 512, "bos_token_id": BOS, "pad_token_id": None}
    model = LlamaForSequenceClassification(llama(**settings | changes)).eval()
    model.save_pretrained(folder)
    make_tokenizer(special, template, eos_token="<end>").save_pretrained(folder)
    return model


def marked_tokenizer():
    """Words between <s> and </s>, as in BERT's family."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", CLS), ("</s>", SEP)])
    names = {"cls_token": "<s>", "sep_token": "</s>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", **names)


def marked(folder, family=BertForSequenceClassification, config=BertConfig, **changes):
    torch.manual_seed(0)
    settings = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    settings |= {"num_labels": 1, "pad_token_id": BERT_PAD, "max_position_embeddings": 40}
    model = family(config(**settings | changes)).eval()
    model.save_pretrained(folder)
    marked_tokenizer().save_pretrained(folder)
    return model


def classifier(folder, **settings):
    return Classifier(str(folder), CPU, RewardSource("classifier", str(folder), **settings))


def given(prompts, texts, conversations=None, ended=None, begin=None):
    known = Responses.of_text(prompts, texts)
    return Responses(
        prompts, texts, conversations or known.conversations, known.columns, ended or known.ended, known.queries, begin
    )


def read(found, responses):
    """What the classifier reads, a string of tokens per response."""
    return ["".join(found.tokenizer.convert_ids_to_tokens(ids)) for ids in found.text.encode(responses).ids]


def alone(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


# -- what is read --------------------------------------------------------------------------------------------------------


def test_text_is_prompt_and_answer_with_an_end_where_the_answer_ended(tmp_path):
    bytes_llama(tmp_path)
    found = classifier(tmp_path)
    assert read(found, given(["Q:", "Q:"], ["yes", "ye"], ended=[True, False])) == ["<bos>Q:yes<end>", "<bos>Q:ye"]


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("<bos>Q:", "yes", "<bos>Q:yes<end>"),
        ("<bos><bos>Q:", "yes", "<bos>Q:yes<end>"),
        ("<s>Q:", "yes", "<bos>Q:yes<end>"),  # the policy's own begin token, which is ordinary text here
        ("Q:", "yes<end>", "<bos>Q:yes<end>"),
    ],
)
def test_begin_and_end_are_there_once_whatever_the_text_brings(tmp_path, prompt, answer, text):
    bytes_llama(tmp_path)
    assert read(classifier(tmp_path), given([prompt], [answer], begin="<s>")) == [text]


def test_no_begin_token_where_the_tokenizer_puts_none_and_no_second_end_where_it_adds_one(tmp_path):
    bytes_llama(tmp_path, special="{}")
    assert read(classifier(tmp_path), given(["Q:"], ["yes"])) == ["Q:yes<end>"]
    bytes_llama(tmp_path, special="<bos> {} <end>")
    found = read(classifier(tmp_path), given(["Q:", "Q:"], ["yes", "ye"], ended=[True, False]))
    assert found == ["<bos>Q:yes<end>", "<bos>Q:ye"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "<bos><|start|>userĊHi<end>Ċ<|start|>assistantĊyes<end>Ċ"),
        ("{{ bos_token }}" + CHATML, "<bos><|start|>userĊHi<end>Ċ<|start|>assistantĊyes<end>Ċ"),
        (BRACKETS, "<bos>[user]Hi<end>[assistant]yes<end>"),
    ],
)
def test_messages_go_through_its_own_template(tmp_path, template, text):
    bytes_llama(tmp_path, template)
    policy = make_tokenizer("<bos> {}", "{{ bos_token }}<<{{ messages[0].content }}>>", eos_token="<end>")
    row = load_prompts([{"prompt": [user("Hi")]}], policy, data()).rows[0]
    assert row.text == "<bos><<Hi>>"
    found = classifier(tmp_path)
    assert read(found, given([row.text], ["yes"], [row.messages])) == [text]
    assert read(found, Responses.of_text([row.text], ["yes"])) == [text]  # the text remembers its messages


PARTS = "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}<end>{% endfor %}"
TOOLS = "{% if tools %}({{ tools[0].name }}){% endif %}" + BRACKETS


@pytest.mark.parametrize(
    ("template", "text"),
    [(PARTS, "<bos>[user]Hi<end>[assistant]yes<end>"), (TOOLS, "<bos>(search)[user]Hi<end>[assistant]yes<end>")],
)
def test_templates_of_parts_and_with_tools(tmp_path, template, text):
    bytes_llama(tmp_path, template)
    responses = given(["Hi"], ["yes"], [[user("Hi")]])
    responses = replace(responses, columns=[{"tools": [{"name": "search"}], "chat_template_kwargs": {"tools": []}}])
    assert read(classifier(tmp_path), responses) == [text]


def test_messages_are_read_as_the_policy_wrote_them_where_it_has_no_template(tmp_path):
    bytes_llama(tmp_path)
    responses = given(["<bos><<Hi>>"], ["yes"], [[user("Hi")]])
    assert read(classifier(tmp_path), responses) == ["<bos><<Hi>>yes<end>"]


def test_a_template_that_refuses_is_named(tmp_path):
    bytes_llama(tmp_path, STRICT)
    with pytest.raises(RewardError, match=r"the chat template refuses the messages \(.*no more than one turn\); give prompts"):
        classifier(tmp_path)(given(["x"], ["yes"], [[user("Hi")]]))


def test_rendered_text_remembers_its_messages_when_it_is_copied():
    text = ChatText("[Hi]", [user("Hi")])
    for other in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert (other, other.messages) == ("[Hi]", [user("Hi")])


def test_what_is_too_long_loses_its_beginning_but_not_the_begin_token(tmp_path, caplog):
    bytes_llama(tmp_path, max_position_embeddings=8)
    found = classifier(tmp_path)
    with caplog.at_level(logging.WARNING, "hydra_ppo"):
        assert read(found, given(["0123456789", "Q:"], ["yes", "no"])) == ["<bos>789yes<end>", "<bos>Q:no<end>"]
        found(given(["0123456789", "Q:"], ["yes", "no"]))
        found(given(["0123456789"], ["yes"]))
    assert [line.getMessage().partition(": ")[2] for line in caplog.records] == [
        "1 of 2 texts are over its 8 tokens and lose their beginning; later ones are not counted."
    ]
    assert read(classifier(tmp_path, max_tokens=5), given(["Q:"], ["yes"])) == ["<bos>yes<end>"]
    with pytest.raises(ConfigError, match="max_tokens=9 of a reward source is over the 8 tokens that its classifier takes"):
        classifier(tmp_path, max_tokens=9)


def test_marks_of_both_ends_stay_whatever_ended_or_was_cut(tmp_path):
    marked(tmp_path, max_position_embeddings=5)
    responses = given(["w1 ", "w1 ", "w1 w2 w3 "], ["w2", "w2", "w4"], ended=[True, False, True])
    assert read(classifier(tmp_path), responses) == ["<s>w1w2</s>", "<s>w1w2</s>", "<s>w2w3w4</s>"]


def test_roberta_counts_places_from_after_its_padding(tmp_path):
    # 40 places, of which those of 0 and of the padding, 1, are no text's: 40 - 1 - 1 = 38 tokens
    model = marked(tmp_path, RobertaForSequenceClassification, RobertaConfig)
    found = classifier(tmp_path)
    assert found.text.longest == 38
    long = " ".join(WORDS * 2)
    ids = [CLS, *[4 + i % 28 for i in range(56)][-36:], SEP]
    assert found([long], [""]) == pytest.approx(alone(model, ids).tolist(), abs=TOLERANCE)


# -- its numbers ---------------------------------------------------------------------------------------------------------

TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w8", "w1 w9 w3", "w5 w4", "w27 w0 w3 w3 w3"]


def gpt2(folder):
    """A classifier whose only special token begins, ends and pads."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=64, n_layer=2, n_head=2, n_positions=64, num_labels=1)
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<|end|>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = {f"{use}_token": "<|end|>" for use in ("bos", "eos", "pad", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **end).save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["llama", "bert", "roberta", "gpt2"])
def test_padding_changes_nothing(tmp_path, family):
    """Also where the pad token ends every text, so that whoever looks for it reads one token too early."""
    made = {
        "llama": lambda: bytes_llama(tmp_path),
        "bert": lambda: marked(tmp_path),
        "roberta": lambda: marked(tmp_path, RobertaForSequenceClassification, RobertaConfig),
        "gpt2": lambda: gpt2(tmp_path),
    }
    model = made[family]()
    found = classifier(tmp_path)
    rows = found.text.encode(given([""] * 5, TEXTS)).ids
    assert family != "gpt2" or {row[-1] for row in rows} == {found.tokenizer.pad_token_id}
    expected = [alone(model, row)[0].item() for row in rows]
    assert len(set(expected)) == 5
    assert found([""] * 5, TEXTS) == pytest.approx(expected, abs=TOLERANCE)


def test_batches_are_of_like_length_and_of_the_size_asked_for(tmp_path):
    bytes_llama(tmp_path)
    found = classifier(tmp_path, batch_size=2)
    seen = []
    hook = found.model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    together = found(["a" * n for n in (9, 1, 8, 2, 5)], [""] * 5)
    hook.remove()
    assert seen == [(2, 4), (2, 10), (1, 11)]  # each with begin and end: 3 and 4, 7 and 10, 11
    assert together == pytest.approx([found(["a" * n], [""])[0] for n in (9, 1, 8, 2, 5)], abs=TOLERANCE)


def test_a_padding_token_is_chosen_that_no_text_holds(tmp_path):
    model = bytes_llama(tmp_path, pad_token_id=PAD)
    found = classifier(tmp_path)
    texts = ["a<pad>", "b<pad>b"]
    expected = [alone(model, row)[0].item() for row in found.text.encode(given(["", ""], texts)).ids]
    assert found(["", ""], texts) == pytest.approx(expected, abs=TOLERANCE)


LABELS = {0: "harmful", 1: "helpful", 2: "honest"}


def with_labels(folder, names, problem_type=None):
    label2id = {name: i for i, name in names.items()}
    return bytes_llama(folder, num_labels=len(names), id2label=names, label2id=label2id, problem_type=problem_type)


def test_a_label_by_name_is_its_log_odds_against_the_others(tmp_path):
    model = with_labels(tmp_path, LABELS)
    found = classifier(tmp_path, label="helpful")(["Q:"], ["yes"])
    probabilities = alone(model, [BOS, *make_tokenizer()("Q:yes")["input_ids"], END]).double().softmax(0)
    # log(p / (1 - p)) of the label's probability p
    assert found[0] == pytest.approx(torch.log(probabilities[1] / (1 - probabilities[1])).item(), abs=TOLERANCE)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_labels_without_a_common_probability_give_their_logits(tmp_path, problem):
    model = with_labels(tmp_path, LABELS, problem)
    logits = alone(model, [BOS, *make_tokenizer()("Q:yes")["input_ids"], END])
    for number, name in LABELS.items():
        assert classifier(tmp_path, label=name)(["Q:"], ["yes"]) == pytest.approx([logits[number].item()], abs=TOLERANCE)


def test_two_labels_give_the_log_odds_of_the_second_unless_another_is_named(tmp_path):
    model = with_labels(tmp_path, {0: "bad", 1: "good"})
    logits = alone(model, [BOS, *make_tokenizer()("Q:yes")["input_ids"], END])
    odds = (logits[1] - logits[0]).item()
    assert classifier(tmp_path)(["Q:"], ["yes"]) == pytest.approx([odds], abs=TOLERANCE)
    assert classifier(tmp_path, label="bad")(["Q:"], ["yes"]) == pytest.approx([-odds], abs=TOLERANCE)


def test_a_label_that_is_needed_or_not_there(tmp_path):
    with_labels(tmp_path, LABELS)
    with pytest.raises(ConfigError, match=r"has 3 labels; .*with one label or two, or .*harmful, helpful, honest"):
        classifier(tmp_path)
    with pytest.raises(ConfigError, match=r"label='kind' is none of the labels of .*; name one of harmful, helpful, honest"):
        classifier(tmp_path, label="kind")


# -- loading -------------------------------------------------------------------------------------------------------------


def without(folder, name, other=None):
    """Drop a tensor from a saved model, or call it something else."""
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(name)
    save_file(tensors | ({other: tensor} if other else {}), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (bytes_llama, "score.weight"),
        (bytes_llama, "model.layers.1.mlp.up_proj.weight"),
        (marked, "classifier.bias"),
        (lambda folder: marked(folder, RobertaForSequenceClassification, RobertaConfig), "classifier.out_proj.weight"),
    ],
)
def test_a_weight_that_the_file_lacks_is_named(tmp_path, make, name):
    make(tmp_path)
    classifier(tmp_path)
    without(tmp_path, name)
    with pytest.raises(ConfigError, match=rf"reward target=.* lacks weight {name} of the model, and none is made up"):
        classifier(tmp_path)


def test_a_head_under_another_name_is_shown(tmp_path):
    bytes_llama(tmp_path)
    without(tmp_path, "score.weight", "value_head.weight")
    with pytest.raises(ConfigError, match=r"lacks weight score.weight of the model \(it holds weight value_head.weight that"):
        classifier(tmp_path)


def test_a_head_of_another_size_is_refused(tmp_path):
    bytes_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["score.weight"] = torch.zeros(3, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"holds weight score.weight in another shape than its config says \(.*: \[3, 64\], not \[1, 64\]"
    ):
        classifier(tmp_path)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path):
    bytes_llama(tmp_path, vocab_size=100)
    with pytest.raises(ConfigError, match="has embeddings for 100 tokens, its tokenizer gives ids up to 259"):
        classifier(tmp_path)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_any_compute_type(tmp_path, name, dtype):
    model = bytes_llama(tmp_path)
    found = classifier(tmp_path, dtype=name)
    assert found.model.score.weight.dtype == dtype
    expected = alone(model, [BOS, *make_tokenizer()("Q:yes")["input_ids"], END])[0].item()
    # bf16 keeps 8 bits of each of some dozens of products
    assert found(["Q:"], ["yes"]) == pytest.approx([expected], abs=TOLERANCE if name == "fp32" else 0.01)


@pytest.mark.parametrize(("quantization", "kind"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit"), ("fp4", "Linear4bit")])
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_quantised_linear_layers_but_not_the_head(tmp_path, family, quantization, kind):
    model = bytes_llama(tmp_path) if family == "llama" else marked(tmp_path, RobertaForSequenceClassification, RobertaConfig)
    found = classifier(tmp_path, quantization=quantization)
    kinds = {name: type(module).__name__ for name, module in found.model.named_modules()}
    heads = {name: kind for name, kind in kinds.items() if name in ("score", "classifier.dense", "classifier.out_proj")}
    assert heads
    assert set(heads.values()) == {"Linear"}
    assert kind in kinds.values()
    rows = found.text.encode(given([""] * 5, TEXTS)).ids
    expected = torch.tensor([alone(model, row)[0].item() for row in rows])
    scores = torch.tensor(found([""] * 5, TEXTS))
    assert not torch.equal(scores, expected)
    assert (scores - expected).abs().max() < 0.1


def test_what_the_files_show_is_known_before_a_weight_is_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were read")

    source = RewardSource("classifier", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be loaded as a classifier"):
        check_source(source)
    with_labels(tmp_path, LABELS)
    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", refuse)
    with pytest.raises(ConfigError, match="has 3 labels; use a classifier"):
        check_source(source)
    check_source(RewardSource("classifier", str(tmp_path), label="helpful"))
    without(tmp_path, "score.weight")
    with pytest.raises(ConfigError, match=r"lacks weight score.weight of the model, and none is made up"):
        check_source(RewardSource("classifier", str(tmp_path), label="helpful"))
