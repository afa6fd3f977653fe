"""A Hugging Face sequence classifier as a reward."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hydra_ppo.config.rewards import RewardSource
from hydra_ppo.errors import ConfigError, HydraError
from hydra_ppo.rewards.classifier_text import ClassifierText
from hydra_ppo.rewards.responses import Responses

logger = logging.getLogger("hydra_ppo")

ROWS = 16
"""Texts per pass where the source does not say."""

INDEPENDENT = ("regression", "multi_label_classification")
"""Kinds of problems whose labels do not share one probability: there a logit stands for itself."""


class Classifier:
    """A sequence classifier as a reward source: one label's logit, or the log-odds of a label against the others.

    What it reads is `ClassifierText`'s matter. Texts run in batches of like length, padded on the right with a token that
    none of them holds: classifiers of transformers look for the last token that is no padding.

    Args:
        target: model folder, or name on the hub.
        device: where it lives. Memory: the classifier once.
        source: label, dtype, quantization, max_tokens and batch_size.

    Raises:
        ConfigError: when it cannot be loaded, its file lacks a weight, or several labels leave open which is wanted.
    """

    remedy = "lower its batch_size or max_tokens where memory ran out, or see whether transformers runs the folder"

    def __init__(self, target: str, device: torch.device, source: RewardSource | None = None) -> None:
        from transformers import AutoTokenizer

        self.target = target
        self.source = source or RewardSource("classifier", target)
        with _saying_why(target):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
        self.model: Any = _load(target, device, self.source)
        self.text = ClassifierText(self.tokenizer, self.model, self.source.max_tokens)
        self.label = _label(self.model.config, self.source)
        rows = self.model.get_input_embeddings().weight.shape[0]
        last = max(self.tokenizer.get_vocab().values(), default=0)
        if last >= rows:
            raise ConfigError(
                f"reward target={target!r} has embeddings for {rows} tokens, its tokenizer gives ids up to {last} "
                f"({self.tokenizer.convert_ids_to_tokens(last)!r}); use the classifier's own tokenizer."
            )
        self._said_cut = False

    def check(self, columns: Collection[str]) -> None:
        """Accept any rows."""

    def __call__(self, prompts: Sequence[str] | Responses, responses: Sequence[str] = ()) -> list[float]:
        """Return one number per response; texts alone are taken for answers that ended."""
        given = prompts if isinstance(prompts, Responses) else Responses.of_text(prompts, responses)
        encoded = self.text.encode(given)
        if encoded.cut and not self._said_cut:
            self._said_cut = True
            logger.warning(
                f"reward target={self.target!r}: {encoded.cut} of {len(given)} texts are over its {self.text.longest} tokens "
                "and lose their beginning; later ones are not counted."
            )
        rows = encoded.ids
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        size = self.source.batch_size or ROWS
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for row, score in zip(chosen, self._scores([rows[row] for row in chosen]), strict=True):
                found[row] = score
        return found

    @torch.no_grad()
    def _scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        from hydra_ppo.compat import accepted_inputs

        pad = self._padding(rows)
        width = max(map(len, rows))
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)  # (B, T)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits: Tensor = self.model(**accepted_inputs(self.model, {"input_ids": ids, "attention_mask": mask})).logits
        scores: list[float] = self._reward(logits.float()).tolist()
        return scores

    def _reward(self, logits: Tensor) -> Tensor:
        """Return (B,) from (B, labels)."""
        named = self.source.label is not None
        if self.label is None or (named and self.model.config.problem_type in INDEPENDENT):
            return logits[:, self.label or 0]
        rest = [i for i in range(logits.shape[1]) if i != self.label]
        return logits[:, self.label] - logits[:, rest].logsumexp(dim=1)

    def _padding(self, rows: Sequence[Sequence[int]]) -> int:
        """Choose the token that fills up rows, and tell the model, which looks for the last one that is another."""
        if self.text.marks_both_ends:  # such models find places by the tokenizer's own padding, and read at another
            return int(self.tokenizer.pad_token_id or 0)
        own, rows_of_embeddings = self.tokenizer.pad_token_id, self.model.get_input_embeddings().weight.shape[0]
        used, last = {i for row in rows for i in row}, {row[-1] for row in rows}
        candidates = [own] if own is not None else []
        candidates += range(rows_of_embeddings)
        pad = next((i for i in candidates if i not in used), None)
        if pad is None:
            pad = next(i for i in candidates if i not in last)
        for config in {id(c): c for c in (self.model.config, self.model.config.get_text_config())}.values():
            config.pad_token_id = pad
        return pad


def check_classifier(source: RewardSource) -> None:
    """Refuse a classifier that could not be used, as far as its files say so before a weight is read.

    Raises:
        ConfigError: as `Classifier` would, where its files lack a weight or several labels leave open which is wanted.
    """
    from hydra_ppo.compat import match_names
    from hydra_ppo.model.fingerprint import model_folder
    from hydra_ppo.model.whole import refuse_incomplete, tensor_shapes, weight_files

    assert source.target is not None
    target, what = source.target, f"reward target={source.target!r}"
    with _saying_why(target):
        config, empty = _empty(target)
        _label(config, source)
        folder = model_folder(target)
        files = weight_files(folder) if folder is not None else []
        if files and getattr(config, "quantization_config", None) is None:
            found = match_names(empty, {name: shape for path in files for name, shape in tensor_shapes(path).items()})
            if found is not None:
                refuse_incomplete(what, found)


def _empty(target: str) -> tuple[Any, Any]:
    """Return a classifier's config, and the classifier without its weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(target, trust_remote_code=False)
    with torch.device("meta"):
        return config, AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def _label(config: Any, source: RewardSource) -> int | None:
    """Return the number of the label whose log-odds are the reward; None where there is but one."""
    wanted = source.label
    names = [str(config.id2label.get(i, i)) for i in range(config.num_labels)]
    if wanted is None and len(names) <= 2:
        return 1 if len(names) == 2 else None
    if wanted is None:
        raise ConfigError(
            f"reward target={source.target!r} has {len(names)} labels; use a classifier with one label or two, or say which is "
            f"wanted with label: {', '.join(names)}."
        )
    if names.count(wanted) != 1:
        raise ConfigError(
            f"label={wanted!r} is {names.count(wanted) or 'none'} of the labels of reward target={source.target!r}; name one "
            f"of {', '.join(names)}."
        )
    return None if len(names) == 1 else names.index(wanted)


def _load(target: str, device: torch.device, source: RewardSource) -> Any:
    from transformers import AutoModelForSequenceClassification

    from hydra_ppo.compat import dtype_option, loads_quantised, stored_dtype
    from hydra_ppo.model.loading import quantization_config, resolve_dtype
    from hydra_ppo.model.whole import load_whole

    what = f"reward target={target!r}"
    with _saying_why(target):
        config, empty = _empty(target)
        compute = resolve_dtype(source.dtype, device, stored_dtype(config))
        place = torch.cuda.current_device() if device.type == "cuda" and device.index is None else str(device)
        options: dict[str, Any] = {"device_map": {"": place}, **dtype_option(compute)}
        if getattr(config, "quantization_config", None) is not None:
            logger.info("%s is quantised already, and stays so", what)
        elif source.quantization is not None:
            if not loads_quantised(device):
                raise ConfigError(
                    f"quantization={source.quantization!r} of {what} needs transformers 4.57 on a CPU; update it, or leave "
                    "quantization out."
                )
            # What a classifier has beside its backbone stays as it is.
            heads = [name for name, _ in empty.named_children() if name != empty.base_model_prefix]
            options["quantization_config"] = quantization_config(source.quantization, compute, keep=heads)
        return load_whole(AutoModelForSequenceClassification, target, what, **options).eval()


@contextmanager
def _saying_why(target: str) -> Iterator[None]:
    """Turn what transformers raises while it reads a classifier into one line."""
    from safetensors import SafetensorError

    from hydra_ppo.model.whole import first_line

    try:
        yield
    except (HydraError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"reward target={target!r} cannot be loaded as a classifier: {first_line(error)}; name a model folder."
        ) from error
