"""Finds the parts of a Hugging Face causal LM that a shared base needs, or says which one is missing."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hydra_ppo.compat import backbone_of, layer_types
from hydra_ppo.compute.logprobs import LMHead
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
    """

    causal_lm: PreTrainedModel
    backbone: nn.Module
    layers: nn.ModuleList
    layers_name: str

    @property
    def config(self) -> Any:
        return self.causal_lm.config

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
        return LMHead(linear.weight, linear.bias, getattr(self.config, "final_logit_softcapping", None))

    def linear_names(self) -> list[str]:
        """Return the names, last part only, of all linear layers inside the decoder layers."""
        names = {name.rsplit(".", 1)[-1] for name, module in self.layers[0].named_modules() if is_linear(module)}
        return sorted(names)

    @property
    def layer_types(self) -> list[str]:
        """`full_attention` or `sliding_attention`, of each decoder layer."""
        return layer_types(self.config, self.layers)

    def sliding_windows(self) -> dict[str, int | None]:
        """Return the attention window in tokens by layer type; None is no window."""
        window = getattr(self.config, "sliding_window", None)
        return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(self.layer_types)}


def inspect_architecture(causal_lm: PreTrainedModel) -> Architecture:
    """Find the backbone, decoder layers and output head of `causal_lm`.

    Raises:
        UnsupportedModelError: naming the part that is missing.
    """
    kind = type(causal_lm).__name__

    def missing(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"model={kind} cannot be a shared base: it has no {what}; use a decoder-only causal LM such as Llama, Mistral, "
            "Qwen2, Qwen3, Gemma 3 (text), Phi-3, GPT-2, GPT-NeoX or OPT."
        )

    if getattr(causal_lm.config, "is_encoder_decoder", False):
        raise missing("decoder-only stack (it is an encoder-decoder)")
    head = causal_lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise missing("output head that is one linear layer")
    backbone = backbone_of(causal_lm)
    if backbone is None:
        raise missing(f"backbone under its base_model_prefix {causal_lm.base_model_prefix!r}")
    if "past_key_values" not in inspect.signature(backbone.forward).parameters:  # XLNet, which sees later tokens too
        raise missing("key-value cache")
    depth = getattr(causal_lm.config, "num_hidden_layers", None)
    stacks = [
        (name.rsplit(".", 1)[-1], module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and all(has_attention(layer) for layer in module)
    ]
    if len(stacks) != 1:
        raise missing(f"single list of decoder layers (found {len(stacks)})")
    architecture = Architecture(causal_lm, backbone, stacks[0][1], stacks[0][0])
    unknown = sorted(set(architecture.layer_types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise missing(f"plain attention in every layer (found {', '.join(unknown)})")
    if not architecture.linear_names():
        raise missing("linear layer inside its decoder layers")
    return architecture


@torch.no_grad()
def check_head(architecture: Architecture) -> None:
    """Compare the model's own logits of two tokens with those that `LMHead` computes.

    A model may scale or shift its logits after the head; log-probs from hidden states would then be silently wrong.

    Raises:
        UnsupportedModelError: when they differ, or are not finite.
    """
    weight = architecture.output_embeddings.weight
    if weight.device.type == "meta":
        return
    tokens = torch.tensor([[0, min(5, weight.shape[0] - 1)]], device=weight.device)
    expected = architecture.causal_lm(input_ids=tokens, use_cache=False).logits.float()
    if not expected.isfinite().all():
        named = architecture.causal_lm.named_parameters()
        broken = next(
            (name for name, weight in named if weight.is_floating_point() and not weight.isfinite().all()), "none alone"
        )
        raise UnsupportedModelError(
            f"model={type(architecture.causal_lm).__name__} computes logits that are NaN or infinite (weight that is: "
            f"{broken}); get the model again, or use a wider model.dtype."
        )
    hidden: Tensor = architecture.backbone(input_ids=tokens, use_cache=False).last_hidden_state
    found = architecture.lm_head().logits(hidden)
    difference = (expected - found).abs().max() / expected.abs().max().clamp(min=1e-6)
    if not difference.item() <= PROBE_TOLERANCE:
        raise UnsupportedModelError(
            f"model={type(architecture.causal_lm).__name__} changes its logits after the output head (relative difference "
            f"{difference.item():.2g}), which log-probs from hidden states would miss; use one of the supported families."
        )


def has_attention(layer: nn.Module) -> bool:
    """Return whether a decoder layer has an attention module (`self_attn`, `attn`, `attention`, `self_attention`)."""
    return any("attn" in name or "attention" in name for name, _ in layer.named_children())


def is_linear(module: nn.Module) -> bool:
    """Return whether LoRA can adapt `module`: linear layers, quantised ones included, and GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


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
