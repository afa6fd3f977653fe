"""TRL's `PPOTrainer` with `train()`: 0.12 to 0.28 as `trl.PPOTrainer`, then as `trl.experimental.ppo.PPOTrainer`.

Role views already take away the copies of the base, the full logits of the update and the kept hidden states. What is
replaced in TRL itself is inert for other models:

- `batch_generation` keeps fp32 `output_scores` of the whole rollout. Here the sampler keeps one log-prob a token.
- `selective_log_softmax` goes row by row through the vocabulary for each; lazy logits do it in one go.
- `save_model` writes what is not a PreTrainedModel as a bare state dict; a view writes its PEFT adapters.
"""

from __future__ import annotations

import functools
import inspect
import logging
from copy import deepcopy
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.config.settings import RolloutSettings
from hydra_ppo.data.ends import special_ids, template_end
from hydra_ppo.model.hydra import HydraModel
from hydra_ppo.patches.binding import Applied, Bindings, install
from hydra_ppo.patches.versions import HostError
from hydra_ppo.rollout.sampling import sample
from hydra_ppo.views.lazy_logits import LazyLogits
from hydra_ppo.views.sampled_logits import SampledLogits
from hydra_ppo.views.view import View
from hydra_ppo.views.views import CausalView, role_views

logger = logging.getLogger("hydra_ppo")

ARGUMENTS = {  # what the models are called, newest first
    "model": "actor",
    "policy": "actor",
    "ref_model": "reference",
    "ref_policy": "reference",
    "reward_model": "reward",
    "value_model": "critic",
}


def apply(model: HydraModel) -> Applied:
    """Patch the trainer; see `hydra_ppo.patches.trl.apply`."""
    module = trainer_module()
    views = role_views(model)
    known = inspect.signature(module.PPOTrainer.__init__).parameters
    arguments = {name: views[role] for name, role in ARGUMENTS.items() if name in known}
    install(module.__name__, lambda bindings: _bind(bindings, module))
    return Applied(module.__name__, arguments)


def trainer_module() -> ModuleType:
    """Return the module that defines the installed trainer; since 0.26 `trl.PPOTrainer` inherits from the experimental one."""
    try:
        return import_module("trl.experimental.ppo.ppo_trainer")
    except ImportError:
        return import_module("trl.trainer.ppo_trainer")


def install_trainer() -> Applied:
    """Patch the trainer without models, for hosts that build it themselves; undone as what `apply` returns."""
    module = trainer_module()
    install(module.__name__, lambda bindings: _bind(bindings, module))
    return Applied(module.__name__, {})


def _bind(bindings: Bindings, module: ModuleType) -> None:
    bindings.set(module, "batch_generation", _batch_generation(module.batch_generation))
    if hasattr(module, "selective_log_softmax"):  # 0.15 and on
        bindings.set(module, "selective_log_softmax", _selective_log_softmax(module.selective_log_softmax))
    bindings.set(module.PPOTrainer, "__init__", _init(module.PPOTrainer.__init__))
    bindings.set(module.PPOTrainer, "save_model", _save_model(module.PPOTrainer.save_model))
    bindings.set(module.PPOTrainer, "train", _train(module.PPOTrainer.train))


def _batch_generation(original: Any) -> Any:
    def batch_generation(
        model: Any, queries: Tensor, local_rollout_forward_batch_size: int, pad_token_id: int, generation_config: Any
    ) -> tuple[Tensor, Any]:
        if not isinstance(model, CausalView):
            return original(model, queries, local_rollout_forward_batch_size, pad_token_id, generation_config)
        return rollout(model, queries, local_rollout_forward_batch_size, pad_token_id, generation_config)

    return batch_generation


@torch.no_grad()
def rollout(
    actor: CausalView, queries: Tensor, batch_size: int, pad_token_id: int, generation_config: Any
) -> tuple[Tensor, SampledLogits]:
    """Sample one response per query as TRL's `batch_generation` does.

    Args:
        actor: samples.
        queries: (B, P), padded with `pad_token_id` on the left.
        batch_size: rows sampled at once.
        pad_token_id: what padding is, and what fills up responses that ended.
        generation_config: max_new_tokens, temperature, top_k, top_p; the end tokens are those of the actor.

    Returns:
        queries with responses (B, P + R), and what stands for their logits (B, R, V).
    """
    model = actor.hydra
    actor.passes.forget()
    _name_what_is_left_out(actor.generation_config)
    settings = RolloutSettings(
        max_new_tokens=generation_config.max_new_tokens,
        temperature=generation_config.temperature,
        top_k=int(generation_config.top_k or 0) or None,
        top_p=generation_config.top_p if generation_config.top_p not in (None, 1.0) else None,
        generation_batch_size=batch_size,
    )
    ends = generation_config.eos_token_id
    ends = actor.generation_config.eos_token_id if ends is None else ends
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    prompts = [[token for token in row if token != pad_token_id] or [0] for row in queries.tolist()]
    generator = torch.Generator(queries.device).manual_seed(int(torch.randint(2**62, ()).item()))  # follows the host's seed
    samples = sample(model, prompts, settings, ends, generator)
    longest = max(len(response) for response in samples.responses)
    tokens = queries.new_full((len(prompts), longest), pad_token_id)
    logprobs = torch.zeros(tokens.shape, device=queries.device)
    for row, (ids, values) in enumerate(zip(samples.responses, samples.logprobs, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids, device=tokens.device)
        logprobs[row, : len(ids)] = torch.tensor(values, device=tokens.device)
    vocabulary = model.architecture.output_embeddings.weight.shape[0]
    return torch.cat([queries, tokens], dim=1), SampledLogits(tokens, logprobs, vocabulary)


# Settings of a generation config that change the distribution, and the values that do not.
PLAIN = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "min_new_tokens": None,
    "min_length": 0,
    "sequence_bias": None,
}
_named: set[str] = set()


def _name_what_is_left_out(config: Any) -> None:
    """Say which of the model's own generation settings the rollout leaves out, once each.

    TRL hands them to `generate` and compares the log-probs that come out, those of a changed distribution, with those of
    the policy itself: the ratio then starts away from 1.
    """
    for name, plain in PLAIN.items():
        value = getattr(config, name, None)
        if value not in (None, plain) and name not in _named:
            _named.add(name)
            logger.warning(
                "generation_config.%s=%s of the model is left out of the rollout: PPO needs log-probs of the policy itself",
                *(name, value),
            )


def _selective_log_softmax(original: Any) -> Any:
    def selective_log_softmax(logits: Any, index: Tensor) -> Tensor:
        if isinstance(logits, LazyLogits):
            return logits.token_logprobs(index).logprobs
        if isinstance(logits, SampledLogits):
            return logits.gather(-1, index[..., None])[..., 0]
        return original(logits, index)

    return selective_log_softmax


def _init(original: Any) -> Any:
    """Give TRL a pad token that is padding and nothing else, and say where its stop token is not the trained end."""
    names = list(inspect.signature(original).parameters)
    place = names.index("processing_class") if "processing_class" in names else len(names) + 1

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        views = [value for value in (*args, *kwargs.values()) if isinstance(value, CausalView)]
        came = None
        if views and "processing_class" in kwargs:
            came = kwargs["processing_class"]
            kwargs["processing_class"] = with_own_pad(came, views[0])
        elif views and len(args) >= place:
            came = args[place - 1]  # `self` is not among the arguments
            args = (*args[: place - 1], with_own_pad(came, views[0]), *args[place:])
        original(self, *args, **kwargs)
        if came is not None:
            self.hydra_tokenizer = came
            _compare_ends(self, views[0])

    return init


def with_own_pad(tokenizer: Any, actor: CausalView) -> Any:
    """Return the tokenizer, or a copy of it whose pad token is no end of an answer, where its own is.

    TRL takes every token that equals the pad for padding, wherever it stands: with an end as pad the score would be read one
    token before the end, and every end of a turn in a prompt would be masked. Padding itself is never fed to a model, so
    any other token that texts do not hold will do.

    Raises:
        HostError: where the vocabulary has no such token.
    """
    ends = {tokenizer.eos_token_id, actor.hydra.trained_end}
    if getattr(tokenizer, "chat_template", None):
        ends.add(template_end(tokenizer))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return tokenizer
    template = tokenizer.chat_template or ""
    held = {tokenizer.bos_token_id, *ends}
    free = [i for i in sorted(special_ids(tokenizer)) if i not in held]
    names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in free}
    rows = actor.hydra.architecture.output_embeddings.weight.shape[0]
    found = next((i for i in free if names[i] not in template and i < rows), None)
    if found is None:
        raise HostError(
            f"tokenizer.pad_token={tokenizer.pad_token!r} ends answers too, and TRL takes every pad for padding; add a token "
            "of its own (tokenizer.add_special_tokens({'pad_token': ...}), with an embedding), before the base is loaded."
        )
    copy = deepcopy(tokenizer)
    copy.pad_token = names[found]
    logger.warning(
        "tokenizer.pad_token=%r ends answers too, and TRL takes every pad for padding: it pads with %r, in a copy of the "
        "tokenizer",
        *(tokenizer.pad_token, names[found]),
    )
    return copy


def _compare_ends(trainer: Any, actor: CausalView) -> None:
    stop, trained = getattr(trainer, "stop_token_id", None), actor.hydra.trained_end
    if trained is not None and stop != trained:
        logger.warning(
            "stop_token_id=%s is not the token that the reward head was trained at; set stop_token=None, stop_token_id=%s in "
            "the PPOConfig, so that answers end and scores are read there",
            *(stop, trained),
        )


def _save_model(original: Any) -> Any:
    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        policy = getattr(self.accelerator.unwrap_model(self.model), "policy", None)
        if not isinstance(policy, View):
            original(self, output_dir, _internal_call)
        elif self.args.should_save:
            policy.save_pretrained(output_dir or self.args.output_dir)
            tokenizer = getattr(self, "hydra_tokenizer", self.processing_class)  # as it came
            if hasattr(tokenizer, "save_pretrained"):
                tokenizer.save_pretrained(output_dir or self.args.output_dir)

    return save_model


def _train(original: Any) -> Any:
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy = getattr(self.accelerator.unwrap_model(self.model), "policy", None)
        if isinstance(policy, View) and self.args.gradient_checkpointing and not policy.hydra.checkpointing:
            logger.warning(
                "gradient_checkpointing=True does nothing in TRL's PPO, whose train() never switches it on; call "
                "model.enable_checkpointing() for less memory and a slower update."
            )
        return original(self, *args, **kwargs)

    return train
