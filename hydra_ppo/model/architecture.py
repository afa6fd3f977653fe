"""Finds the parts of a Hugging Face causal LM that a shared base needs, or says which one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hydra_ppo.compat import backbone_of, last_hidden_state, layer_types, states_at_head
from hydra_ppo.compute.lm_head import LMHead
from hydra_ppo.errors import UnsupportedModelError

PROBE_TOLERANCE = 1e-3
"""Largest relative difference between the model's own logits and `LMHead`'s at which the head counts as understood."""


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one causal LM are.

    Attributes:
        causal_lm: the whole model.
        backbone: the part that returns final hidden states.
        layers: its decoder layers, in order.
        layers_name: attribute that holds them (`layers`, `h`), as PEFT's `layers_pattern` wants it.
        through_model: whether the output head reads something else than the backbone returns (MiniCPM3 scales it, BERT's
            decoders have a layer in between), so that a pass goes through the whole model up to the head.
        scale: what the model multiplies its logits with after the head (Cohere, Granite).
        softcap: what bounds them after that (Gemma 2).
    """

    causal_lm: PreTrainedModel
    backbone: nn.Module
    layers: nn.ModuleList
    layers_name: str
    through_model: bool = False
    scale: float = 1.0
    softcap: float | None = None

    @property
    def config(self) -> Any:
        """The config that the decoder layers read: that of the text model, where a checkpoint holds others too."""
        return text_config(self.causal_lm)

    @property
    def hidden_size(self) -> int:
        """Width of the final hidden states (OPT-350m projects them down)."""
        return self.output_embeddings.weight.shape[1]

    @property
    def input_embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.causal_lm.get_input_embeddings())

    @property
    def output_embeddings(self) -> nn.Linear:
        return self.causal_lm.get_output_embeddings()

    def lm_head(self) -> LMHead:
        """Return the output head as tensors; they are the model's own, not copies."""
        linear = self.output_embeddings
        return LMHead(linear.weight, linear.bias, self.softcap, self.scale)

    def final_states(self, input_ids: Tensor, **options: Any) -> Tensor:
        """Run the model up to its output head; return (B, T, H), what the head reads.

        Args:
            input_ids: (B, T).
            options: attention_mask, position_ids, past_key_values as the Hugging Face backbone takes them; a cache is filled.
        """
        if self.through_model:
            return states_at_head(self.causal_lm, self.output_embeddings, input_ids, **options)
        return last_hidden_state(self.backbone, input_ids, **options)

    def linear_names(self) -> list[str]:
        """Return the names, last part only, of all linear layers inside the decoder layers."""
        return sorted({name.rsplit(".", 1)[-1] for name, module in self.layers.named_modules() if is_linear(module)})

    def linear_paths(self, first_layer: int = 0) -> Iterator[str]:
        """Yield the full names of the linear layers inside the decoder layers from `first_layer` on."""
        inside = {id(module) for layer in list(self.layers)[first_layer:] for module in layer.modules() if is_linear(module)}
        yield from (name for name, module in self.causal_lm.named_modules() if id(module) in inside)

    def expert_paths(self, first_layer: int = 0) -> Iterator[str]:
        """Yield the full names of the parameters that hold all experts of a layer at once, (E, ., .) each."""
        inside = {id(p) for layer in list(self.layers)[first_layer:] for p in layer.parameters() if p.ndim == 3}
        yield from (name for name, parameter in self.causal_lm.named_parameters() if id(parameter) in inside)

    @property
    def layer_types(self) -> list[str]:
        """`full_attention` or `sliding_attention`, of each decoder layer."""
        return layer_types(self.config, self.layers)

    def sliding_windows(self) -> dict[str, int | None]:
        """Return the attention window in tokens by layer type; None is no window."""
        window = getattr(self.config, "sliding_window", None)
        return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(self.layer_types)}


def inspect_architecture(causal_lm: PreTrainedModel) -> Architecture:
    """Find the backbone, decoder layers and output head of `causal_lm`. Whether its passes are those of a decoder is not
    asked here: `model.probe` tries.

    Raises:
        UnsupportedModelError: naming the part that is missing.
    """
    kind = type(causal_lm).__name__

    def missing(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"model={kind} cannot be a shared base: it has no {what}; use a decoder-only causal LM such as Llama, Mistral, "
            "Qwen2, Qwen3, Gemma 3, Phi-3, GPT-2, GPT-NeoX or OPT."
        )

    if getattr(causal_lm.config, "is_encoder_decoder", False):
        raise missing("decoder-only stack (it is an encoder-decoder)")
    head = causal_lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise missing("output head that is one linear layer")
    backbone = backbone_of(causal_lm)
    if backbone is None:
        raise missing(f"backbone under its base_model_prefix {causal_lm.base_model_prefix!r}")
    depth = getattr(text_config(causal_lm), "num_hidden_layers", None)
    stacks = [
        (name.rsplit(".", 1)[-1], module)
        for name, module in _text_part(causal_lm, backbone).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not stacks:
        raise missing(f"list of {depth} decoder layers")
    # Of several (norms, caches and the like stand in lists too) the layers hold the weights.
    name, layers = max(stacks, key=lambda stack: sum(p.numel() for p in stack[1].parameters()))
    # Taken by its name first: in half precision the bend of a mild cap is no more than rounding.
    softcap = next(iter(_caps(text_config(causal_lm))), None)
    architecture = Architecture(causal_lm, backbone, layers, name, softcap=softcap)
    if not architecture.linear_names():
        raise missing("linear layer inside its decoder layers")
    return architecture


def text_config(causal_lm: PreTrainedModel) -> Any:
    """Return the config of the language model: the model's own, or that of the text in a checkpoint of several kinds."""
    return getattr(causal_lm.config, "text_config", None) or causal_lm.config


def _text_part(causal_lm: PreTrainedModel, backbone: nn.Module) -> nn.Module:
    """Return the part of a backbone in which the decoder layers are; beside it there may be towers for images and sound."""
    for name in ("language_model", "text_model"):
        found = getattr(backbone, name, None)
        if isinstance(found, nn.Module):
            return found
    return backbone


@torch.no_grad()
def understand_head(architecture: Architecture) -> Architecture:
    """Compare the model's own logits of two tokens with those that `LMHead` computes from hidden states.

    A model may do something between backbone and head, or scale its logits after the head; log-probs from hidden states would
    then be silently wrong.

    Returns:
        The architecture, with what was found out.

    Raises:
        UnsupportedModelError: when they differ in another way, or are not finite.
    """
    weight = architecture.output_embeddings.weight
    kind = type(architecture.causal_lm).__name__
    tokens = torch.tensor([[0, min(5, weight.shape[0] - 1)]], device=weight.device)
    expected = architecture.causal_lm(input_ids=tokens, use_cache=False).logits.float()
    if not expected.isfinite().all():
        named = architecture.causal_lm.named_parameters()
        broken = next(
            (name for name, weight in named if weight.is_floating_point() and not weight.isfinite().all()), "none alone"
        )
        raise UnsupportedModelError(
            f"model={kind} computes logits that are NaN or infinite (weight that is: "
            f"{broken}); get the model again, or use a wider model.dtype."
        )
    difference = float("inf")
    tolerance = max(PROBE_TOLERANCE, 2 * torch.finfo(weight.dtype).eps) if weight.is_floating_point() else PROBE_TOLERANCE
    for through in (False, True):
        found = replace(architecture, through_model=through)
        try:
            hidden = found.final_states(tokens)
        except (LookupError, AttributeError, TypeError):
            continue
        if hidden.shape[-1] != weight.shape[1]:
            continue
        ways = [
            {},
            *_scales(architecture.config, expected, found.lm_head().logits(hidden), tolerance),
            {"softcap": None},
        ]
        candidates = [replace(found, **cast(dict[str, Any], way)) for way in ways]
        scale = expected.abs().max().clamp(min=1e-6)
        away = [((expected - one.lm_head().logits(hidden)).abs().max() / scale).item() for one in candidates]
        # What is clearly nearer is meant, else what the config names.
        best = min(range(len(away)), key=away.__getitem__)
        best = 0 if away[0] <= 2 * away[best] + 1e-6 else best
        difference = min(difference, away[best])
        if away[best] <= tolerance:
            return candidates[best]
    raise UnsupportedModelError(
        f"model={kind} changes its logits after the output head (relative difference {difference:.2g}), by no number "
        "that its config names, which log-probs from hidden states would miss; use one of the supported families."
    )


def _caps(config: Any) -> list[float]:
    """Return what a config bounds logits by, whatever it calls it; not what bounds attention scores."""
    named = {k: v for k, v in config.to_dict().items() if "cap" in k and "logit" in k and "att" not in k}
    return [float(v) for v in named.values() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]


def _scales(config: Any, expected: Tensor, found: Tensor, tolerance: float) -> list[dict[str, float]]:
    """Return the numbers of a config, and one over them, by which `found` would become `expected`, the nearest first.

    What is measured is rounded, so that it only says which number is meant.
    """
    measured = ((expected * found).sum() / found.square().sum().clamp(min=1e-30)).item()
    numbers = [v for v in config.to_dict().values() if isinstance(v, int | float) and not isinstance(v, bool) and v]
    candidates = {float(n) for n in numbers} | {1 / n for n in numbers}
    near = [n for n in candidates if abs(n / measured - 1) <= 10 * tolerance] if measured else []
    return [{"scale": n} for n in sorted(near, key=lambda n: abs(n / measured - 1))]


def is_linear(module: nn.Module) -> bool:
    """Return whether LoRA can adapt `module`: linear layers, quantised ones included, and GPT-2's Conv1D.

    Of a model's own kinds those that return a product and nothing else: not the routers of Llama 4 and PhiMoE.
    """
    if isinstance(module, nn.Linear):
        own = type(module) is not nn.Linear and type(module).__module__.startswith("transformers.models.")
        return not own or _returns_product(module)
    return type(module).__name__ == "Conv1D"


@torch.no_grad()
def _returns_product(module: nn.Linear) -> bool:
    try:
        return isinstance(module(module.weight.new_zeros(1, module.in_features)), Tensor)
    except Exception:  # whatever it wants besides, it is no linear layer
        return False


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0.

    PPO compares log-probs of two passes; noise between them would look like a change of policy.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)


def keep_quantised_layers_trainable(model: nn.Module) -> None:
    """Leave bitsandbytes layers in training mode for good.

    In evaluation mode their CPU kernel repacks 4-bit weights on first use. Results then differ in the sixth digit, and a
    later backward pass goes through a kernel that has none: gradients are silently wrong.

    Raises:
        UnsupportedModelError: when that has happened already.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise UnsupportedModelError(
                    f"model layer {name!r} was repacked by an evaluation pass and has no gradient any more; load the model "
                    "afresh and hand it over before its first pass."
                )
