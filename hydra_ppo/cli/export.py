"""Writes a role of a run in a form that other programs load.

The actor is a causal LM, reward and critic are sequence classifiers: merged into an unquantised base, or the adapter alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.aside import check_empty, whole_or_nothing
from hydra_ppo.cli.choices import ExportedRole
from hydra_ppo.cli.saved import base_if_here, beside, check_saved, run_ends, tokenizer_folder, trained_quantization
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.fingerprint import model_folder
from hydra_ppo.model.manifest import MANIFEST, check_base, findable
from hydra_ppo.runs.contents import TOKENIZER_FILES, TOKENIZER_FOLDER

PROBE_TEXT = "It's 12:30, naïve — 你好,\n\n  world! \U0001f600 don't"
PROBE_TOKENS = 200
"""What two tokenizers are compared by: a text, and what so many tokens of the vocabulary say."""

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hydra_ppo.data.padding import Padding


def export_role(
    run: str | Path, output: str | Path, *, role: ExportedRole = "actor", adapter_only: bool = False, dtype: str = "auto"
) -> list[str]:
    """Write one role of a run for programs that know nothing of this one; return what a user should know, a line each.

    Args:
        run: folder of a finished sft or ppo run, or a checkpoint.
        output: new folder: config, safetensors weights and tokenizer; or a PEFT adapter folder with `adapter_only`.
        role: `actor` (the SFT policy, where there is no actor yet) and `actor_ema` become causal LMs that stop where the run's
            answers end; `reward` and `critic` become sequence classifiers with one label, read at the last token of a row.
        adapter_only: leave the base out.
        dtype: of the weights that are written: auto, fp32, bf16 or fp16. auto keeps the actor as the base is stored, and
            writes classifiers in fp32: rounded to bf16, scores differ in the second digit.

    Memory: the unquantised base once, on the CPU (nothing with `adapter_only`).

    Raises:
        ConfigError: when `run` holds no whole model or no such role, or `output` is not empty; nothing is made then.
        UnsupportedModelError: when the family has no sequence classifier.
    """
    run, output = Path(run).expanduser(), Path(output).expanduser()
    if not (run / MANIFEST).is_file():
        raise ConfigError(f"run={str(run)!r} holds no {MANIFEST}; name the folder of a finished sft or ppo run.")
    check_empty("output", output)
    manifest = check_saved(run, needs_base=not adapter_only)
    adapter = _spec(run, manifest, role)["adapter"]
    if adapter is None and adapter_only:
        raise ConfigError(
            f"run={str(run)!r} trained the base itself and has no adapter; export it without --adapter-only, push it --merged."
        )
    base = base_if_here(run)
    if base is not None:
        check_base(run, base)
    export = _Export(run, manifest, role, adapter, base, output)
    with whole_or_nothing(output) as aside:
        notes = export.write(aside, adapter_only, dtype)
        notes += _other_tokens(tokenizer_folder(run), aside, output)
    return [*notes, *export.roundings(adapter_only), export.how_to_load(adapter_only)]


def _spec(run: Path, manifest: Mapping[str, Any], role: ExportedRole) -> Mapping[str, Any]:
    """Return adapter and head of a role.

    Raises:
        ConfigError: where the run has no such role, or never trained it.
    """
    roles: Mapping[str, Mapping[str, Any]] = manifest["roles"]
    found = roles.get(role) or (roles.get("reference") if role == "actor" else None)
    if found is None:
        raise ConfigError(f"role={role!r} is not in run={str(run)!r}, which holds {', '.join(roles)}; name a run that has it.")
    if role == "reward" and not manifest["reward_head_trained"]:
        raise ConfigError(
            f"role='reward' of run={str(run)!r} was never trained, its head says nothing; export a run of sft with "
            "reward_coef above 0, or a ppo run that began from one."
        )
    if role == "critic" and manifest.get("value_range") is not None:
        raise ConfigError(
            f"role='critic' of run={str(run)!r} has values within value_range={manifest['value_range']}, which no sequence "
            "classifier says; use it in ppo, or export another role."
        )
    return found


@dataclass(frozen=True)
class _Export:
    """One role of a run on its way out.

    Attributes:
        run: the run folder, or a checkpoint.
        adapter: its name; None where the base itself was trained.
        base: where the base lies; None where it is not there, which an adapter alone does without.
        output: where the export will be when it is whole.
    """

    run: Path
    manifest: Mapping[str, Any]
    role: ExportedRole
    adapter: str | None
    base: str | None
    output: Path

    @property
    def _is_causal(self) -> bool:
        return self.role in ("actor", "actor_ema")

    def write(self, folder: Path, adapter_only: bool, dtype: str) -> list[str]:
        """Write everything into a folder; return what a user should know."""
        if self._is_causal:
            return self._adapter(folder) if adapter_only else self._actor(folder, dtype)
        return self._classifier(folder, adapter_only, dtype)

    def roundings(self, adapter_only: bool) -> list[str]:
        """Say that a run on a quantised base says other things on another."""
        stored = self.base is not None and "quantization_config" in _config_of(self.base)
        linears, embeddings = trained_quantization(self.run, self.manifest), self.manifest.get("embeddings")
        parts = [*([linears] if linears else []), *([f"embeddings in {embeddings}"] if embeddings else [])]
        if not parts:
            return []
        held = " with ".join(parts)
        if adapter_only:
            return [f"trained over a base held as {held}: over another, or the unquantised one, it says something else"]
        if stored and not embeddings:
            return [f"the base is stored as {held}: written are the weights that it stands for, unpacked"]
        what = "log-probs" if self._is_causal else "scores"
        return [f"trained over a base held as {held}, written over the unquantised one: {what} differ by its rounding"]

    def how_to_load(self, adapter_only: bool) -> str:
        """Say what was written, and the line of Python that loads it."""
        kind = self._causal_class() if self._is_causal else "AutoModelForSequenceClassification"
        what = f"Wrote {self.role} to {self.output}"
        if not adapter_only:
            return f"{what}, a model of its own: {kind}.from_pretrained({str(self.output)!r})"
        base = findable(self.base) if self.base is not None else self._base_of_adapter()
        more = "" if self._is_causal else f", num_labels=1, pad_token_id={self._padding()[1].id}"
        return f"{what}, an adapter: PeftModel.from_pretrained({kind}.from_pretrained({base!r}{more}), {str(self.output)!r})"

    def _causal_class(self) -> str:
        """Return the name of the auto class that loads the base, or what stands on it."""
        from hydra_ppo.model.whole import causal_class, read_config

        return "AutoModelForCausalLM" if self.base is None else str(causal_class(read_config(self.base)).__name__)

    # -- the actor -------------------------------------------------------------------------------------------------------

    def _adapter(self, folder: Path) -> list[str]:
        assert self.adapter is not None
        shutil.copytree(self.run / self.adapter, folder, dirs_exist_ok=True)
        settings, notes = self._adapter_settings()
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if (own := beside(self.run, "tokenizer_config.json")) is not None:  # whoever loads the adapter has that of the base
            copy_tokenizer(own, folder)
        return notes + (_other_ends(self.base, self._ends()) if self.base is not None else [])

    def _actor(self, folder: Path, dtype: str) -> list[str]:
        from hydra_ppo.model.for_others import save_for_others

        merged, ends = self._merged(dtype), self._ends()
        if ends and merged.generation_config is not None:
            merged.generation_config.eos_token_id = list(ends)
        notes = save_for_others(merged, folder)
        if (tokenizer := tokenizer_folder(self.run)) is not None:
            copy_tokenizer(tokenizer, folder)
        return notes

    def _ends(self) -> tuple[int, ...]:
        """Return the tokens that end answers; none where neither the run nor a tokenizer says."""
        if self.manifest.get("end_ids"):
            return tuple(self.manifest["end_ids"])
        folder = tokenizer_folder(self.run)
        return run_ends(self.manifest, load_tokenizer_of(folder)) if folder is not None else ()

    # -- classifiers -----------------------------------------------------------------------------------------------------

    def _classifier(self, folder: Path, adapter_only: bool, dtype: str) -> list[str]:
        from hydra_ppo.data.tokenizer_files import save_tokenizer
        from hydra_ppo.model.classifier import as_classifier
        from hydra_ppo.model.for_others import save_for_others

        tokenizer, padding = self._padding()
        ends = run_ends(self.manifest, tokenizer)
        head = _head(self.run, _spec(self.run, self.manifest, self.role)["head"])
        if adapter_only:
            notes = self._classifier_adapter(folder, head, padding)
        else:
            merged = self._merged("fp32" if dtype == "auto" else dtype)
            notes = save_for_others(as_classifier(merged, head, padding.id, ends[0], self.role), folder)
        if padding.why is not None:
            notes.append(f"{padding.why}: the classifier and its tokenizer pad with {padding.text} ({padding.id})")
        tokenizer.padding_side = "right"  # absolute positions, as GPT-2's, are wrong after padding on the left
        save_tokenizer(tokenizer, folder)
        text = tokenizer.convert_ids_to_tokens(ends[0])
        notes += self._left_out()
        return [*notes, f"a text is to end in {text} ({ends[0]}), where the {self.role} was trained; nothing adds it by itself"]

    def _left_out(self) -> list[str]:
        """Say what of a reward model one linear head cannot hold."""
        from hydra_ppo.model.heads import saved_plan

        plan = saved_plan(self.manifest)
        if self.role != "reward":
            return []
        several = [f"written is the mean of {plan.reward} reward heads"] if plan.reward > 1 else []
        expects = (
            "the classifier gives r(x, y), without the expected reward of the prompt: answers to one prompt differ as before"
        )
        return [*several, *([f"{expects}, those to several prompts do not"] if plan.expected else [])]

    def _padding(self) -> tuple[PreTrainedTokenizerBase, Padding]:
        """Return the run's tokenizer, and what it pads with where that is part of no text."""
        from hydra_ppo.data.padding import pad_unread

        folder = tokenizer_folder(self.run)
        if folder is None:
            raise ConfigError(
                f"run={str(self.run)!r} holds no tokenizer, which says where a classifier reads; copy the tokenizer's files "
                "into it."
            )
        tokenizer = load_tokenizer_of(folder)
        return tokenizer, pad_unread(tokenizer, run_ends(self.manifest, tokenizer))

    def _classifier_adapter(self, folder: Path, head: Tensor, padding: Padding) -> list[str]:
        """Write an adapter of a sequence classifier with its head."""
        from safetensors.torch import load_file, save_file

        assert self.adapter is not None
        if padding.id >= self._rows():
            raise ConfigError(
                f"--adapter-only: {padding.why}, and the base has no token to spare, so a classifier on it would read the "
                "wrong place; export without --adapter-only (push --merged), which adds one."
            )
        settings, notes = self._adapter_settings()
        settings |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        state = load_file(self.run / self.adapter / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(
            state | {"base_model.model.score.weight": head}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
        return notes

    def _rows(self) -> int:
        """Return how many tokens the base has embeddings for; where it is not there, those that the tokenizer knows."""
        from transformers import AutoConfig

        if self.base is not None:
            return int(AutoConfig.from_pretrained(self.base, trust_remote_code=False).get_text_config().vocab_size)
        folder = tokenizer_folder(self.run)
        return len(load_tokenizer_of(folder)) if folder is not None else 0

    # -- both ------------------------------------------------------------------------------------------------------------

    def _adapter_settings(self) -> tuple[dict[str, Any], list[str]]:
        """Return an adapter's config, which names the base where it lies now: run and base may have been moved together."""
        path = self.run / str(self.adapter) / "adapter_config.json"
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if self.base is not None:
            return settings | {"base_model_name_or_path": findable(self.base)}, []
        was = settings.get("base_model_name_or_path")
        return settings, [f"the base is not where the run expects it; the adapter names {was!r}, where it was trained"]

    def _base_of_adapter(self) -> str:
        return str(self._adapter_settings()[0].get("base_model_name_or_path"))

    def _merged(self, dtype: str) -> PreTrainedModel:
        """Return the unquantised base of a run with one adapter added to its weights.

        LoRA deltas cannot be added to 4-bit or 8-bit weights without rounding them away: the base is loaded whole.
        """
        import torch
        from peft import PeftModel

        from hydra_ppo.compat import dtype_option, stored_dtype
        from hydra_ppo.model.adapter_options import saved_options
        from hydra_ppo.model.adapters import check_fit
        from hydra_ppo.model.for_others import unquantised
        from hydra_ppo.model.loading import DTYPES
        from hydra_ppo.model.whole import causal_class, load_whole, read_config, saying_why, tensor_shapes

        wanted = DTYPES.get(dtype)
        options = dtype_option("auto" if wanted is None else wanted)
        assert self.base is not None  # only an adapter alone does without
        with saying_why(self.base):
            kind = causal_class(read_config(self.base))
            base = load_whole(kind, self.base, f"run={str(self.run)!r}, its base {self.base!r}", **options)
        if getattr(base, "is_quantized", False):
            base = unquantised(base, wanted or stored_dtype(base.config) or torch.bfloat16)
        if self.adapter is None:
            return base
        folder = self.run / self.adapter
        # PEFT would leave fresh what the folder lacks, and read any option that its config names.
        adapted = PeftModel.from_pretrained(base, folder, config=saved_options(folder))
        check_fit(adapted, "default", folder, tensor_shapes(folder / "adapter_model.safetensors"))
        merged: PreTrainedModel = adapted.merge_and_unload()
        return merged


def _config_of(base: str) -> dict[str, Any]:
    folder = model_folder(base)
    path = folder / "config.json" if folder is not None else None
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}


def _other_ends(base: str, ends: Sequence[int]) -> list[str]:
    """Say where a base on its own would not stop as the run's answers do."""
    from transformers import GenerationConfig

    try:
        known = GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:
        known = None
    stops = known if isinstance(known, list) else [known]
    if not ends or ends[0] in stops:
        return []
    return [f"answers end at token {ends[0]}, the base's own settings stop at {known}: generate with eos_token_id={list(ends)}"]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer: all files that transformers 4 and 5 write, templates, and code that comes with it."""
    from hydra_ppo.data.tokenizer_files import for_both_versions

    for pattern in (*TOKENIZER_FILES, "tokenization_*.py", "*.tiktoken", "tokenizer.model.v*"):
        for path in source.glob(pattern):
            shutil.copy2(path, target / path.name)
    if (source / TOKENIZER_FOLDER).is_dir():
        shutil.copytree(source / TOKENIZER_FOLDER, target / TOKENIZER_FOLDER, dirs_exist_ok=True)
    for_both_versions(target)


def _head(run: Path, name: str) -> Tensor:
    """Return a scalar head (1, H); of several reward heads the one that says their mean."""
    from safetensors.torch import load_file

    from hydra_ppo.model.heads import mean_weight
    from hydra_ppo.model.saving import HEADS

    return mean_weight(load_file(run / HEADS)[f"{name}.weight"])


def _other_tokens(folder: Path | None, written: Path, output: Path) -> list[str]:
    """Say where a tokenizer that was written is not read as the run reads its own.

    Beside a config.json of some families (Qwen2 is one) transformers 5 takes the family's tokenizer class, whatever the files
    say of themselves.
    """
    if folder is None or not (written / "tokenizer_config.json").is_file():
        return []
    try:
        ours, theirs = load_tokenizer_of(folder), load_tokenizer_of(written)
    except ConfigError:  # one with code of its own, which is not run here
        return []
    few = sorted(ours.get_vocab().values())[:: max(1, len(ours) // PROBE_TOKENS)]
    for text in (PROBE_TEXT, ours.decode(few)):
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            return [
                f"AutoTokenizer takes {type(theirs).__name__} beside this config.json, which cuts texts into other tokens than "
                f"the run's; load it as PreTrainedTokenizerFast.from_pretrained({str(output)!r})"
            ]
    return []


def load_tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder.

    Raises:
        ConfigError: where there is none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"run={str(folder)!r} gives no tokenizer: {reason}; copy the tokenizer's files into it.") from error
