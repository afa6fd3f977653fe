"""Writes a role of a run in a form that other programs load.

The actor is a causal LM, reward and critic are sequence classifiers: merged into an unquantised base, or the adapter alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.choices import ExportedRole
from hydra_ppo.cli.saved import beside, check_saved, run_ends, tokenizer_folder, trained_quantization
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.manifest import MANIFEST, base_folder, check_base, findable
from hydra_ppo.runs.folder import TOKENIZER_FILES, TOKENIZER_FOLDER

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
        role: `actor` (the SFT policy, where there is no actor yet) becomes a causal LM that stops where the run's answers
            end; `reward` and `critic` become sequence classifiers with one label, read at the last token of a row.
        adapter_only: leave the base out.
        dtype: of the weights that are written: auto, fp32, bf16 or fp16. auto keeps the actor as the base is stored, and
            writes classifiers in fp32: rounded to bf16, scores differ in the second digit.

    Memory: the unquantised base once, on the CPU (nothing with `adapter_only`).

    Raises:
        ConfigError: when `run` holds no whole model or no such role, or `output` is not empty; nothing is made then.
        UnsupportedModelError: when the family has no sequence classifier.
    """
    run, output = Path(run), Path(output)
    if not (run / MANIFEST).is_file():
        raise ConfigError(f"run={str(run)!r} holds no {MANIFEST}; name the folder of a finished sft or ppo run.")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"output={str(output)!r} is not empty; choose another folder.")
    manifest = check_saved(run)
    adapter = _spec(run, manifest, role)["adapter"]
    if adapter is None and adapter_only:
        raise ConfigError(f"run={str(run)!r} trained the base itself and has no adapter; export it without --adapter-only.")
    check_base(run, base_folder(run))
    if role == "actor":
        notes = _export_actor(run, output, manifest, adapter, adapter_only, dtype)
    else:
        notes = _export_classifier(run, output, manifest, role, adapter_only, dtype)
    notes += _other_tokens(tokenizer_folder(run), output)
    held = trained_quantization(run, manifest)
    if held is not None and not adapter_only:
        what = "log-probs" if role == "actor" else "scores"
        notes.append(f"trained over a base held as {held}, written over the unquantised one: {what} differ by its rounding")
    elif held is not None:
        notes.append(f"trained over a base held as {held}: over another, or the unquantised one, it says something else")
    return notes


def export_actor(run: str | Path, output: str | Path, *, adapter_only: bool = False) -> None:
    """Write the actor of a run; see `export_role`."""
    export_role(run, output, adapter_only=adapter_only)


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
    return found


# -- the actor -----------------------------------------------------------------------------------------------------------


def _export_actor(
    run: Path, output: Path, manifest: Mapping[str, Any], adapter: str | None, adapter_only: bool, dtype: str
) -> list[str]:
    folder = tokenizer_folder(run)
    ends = _known_ends(manifest, folder)
    if adapter is not None and adapter_only:
        output.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run / adapter, output, dirs_exist_ok=True)
        settings = _adapter_settings(run, adapter)
        (output / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if (own := beside(run, "tokenizer_config.json")) is not None:  # whoever loads the adapter has that of the base
            copy_tokenizer(own, output)
        return _other_ends(base_folder(run), ends)
    merged = _merged(run, adapter, dtype)
    if ends and merged.generation_config is not None:
        merged.generation_config.eos_token_id = list(ends)
        _make_valid(merged.generation_config)
    merged.save_pretrained(output)
    if folder is not None:
        copy_tokenizer(folder, output)
    return []


def _known_ends(manifest: Mapping[str, Any], folder: Path | None) -> tuple[int, ...]:
    """Return the tokens that end answers; none where neither the run nor a tokenizer says."""
    if manifest.get("end_ids"):
        return tuple(manifest["end_ids"])
    return run_ends(manifest, _tokenizer(folder)) if folder is not None else ()


def _make_valid(settings: Any) -> None:
    """Let a generation config be written that names a temperature and does not sample, as old models' do."""
    try:
        settings.validate(**({"strict": True} if "strict" in settings.validate.__code__.co_varnames else {}))
    except ValueError:
        settings.do_sample = True


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
    """Copy a tokenizer as it is: all files that transformers 4 and 5 write, templates, and code that comes with it."""
    for pattern in (*TOKENIZER_FILES, "tokenization_*.py", "*.tiktoken", "tokenizer.model.v*"):
        for path in source.glob(pattern):
            shutil.copy2(path, target / path.name)
    if (source / TOKENIZER_FOLDER).is_dir():
        shutil.copytree(source / TOKENIZER_FOLDER, target / TOKENIZER_FOLDER, dirs_exist_ok=True)


# -- classifiers ---------------------------------------------------------------------------------------------------------


def _export_classifier(
    run: Path, output: Path, manifest: Mapping[str, Any], role: ExportedRole, adapter_only: bool, dtype: str
) -> list[str]:
    from hydra_ppo.data.padding import pad_unread
    from hydra_ppo.model.classifier import as_classifier

    spec = _spec(run, manifest, role)
    folder = tokenizer_folder(run)
    if folder is None:
        raise ConfigError(
            f"run={str(run)!r} holds no tokenizer, which says where a classifier reads; copy the tokenizer's files into it."
        )
    tokenizer = _tokenizer(folder)
    ends = run_ends(manifest, tokenizer)
    padding = pad_unread(tokenizer, ends)
    head = _head(run, spec["head"])
    if adapter_only:
        notes = _classifier_adapter(run, output, spec["adapter"], head, padding)
    else:
        merged = _merged(run, spec["adapter"], "fp32" if dtype == "auto" else dtype)
        as_classifier(merged, head, padding.id, ends[0], role).save_pretrained(output)
        notes = []
    if padding.why is not None:
        notes.append(f"{padding.why}: the classifier and its tokenizer pad with {padding.text} ({padding.id})")
    tokenizer.padding_side = "right"  # absolute positions, as GPT-2's, are wrong after padding on the left
    tokenizer.save_pretrained(output)
    text = tokenizer.convert_ids_to_tokens(ends[0])
    return [*notes, f"a text is to end in {text} ({ends[0]}), where the {role} was trained; nothing adds it by itself"]


def _classifier_adapter(run: Path, output: Path, adapter: str, head: Tensor, padding: Padding) -> list[str]:
    """Write an adapter of a sequence classifier with its head, and say how it is loaded."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    base = base_folder(run)
    rows = AutoConfig.from_pretrained(base).get_text_config().vocab_size
    if padding.id >= rows:
        raise ConfigError(
            f"--adapter-only: {padding.why}, and the base has no token to spare, so a classifier on it would read the wrong "
            "place; export without --adapter-only, which adds one."
        )
    settings = _adapter_settings(run, adapter) | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    state = load_file(run / adapter / "adapter_model.safetensors")
    output.mkdir(parents=True, exist_ok=True)
    (output / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(state | {"base_model.model.score.weight": head}, output / "adapter_model.safetensors", metadata={"format": "pt"})
    return [
        f"load it as PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels=1, "
        f"pad_token_id={padding.id}), {str(output)!r})"
    ]


def _adapter_settings(run: Path, adapter: str) -> dict[str, Any]:
    """Return an adapter's config, which names the base where it lies now: run and base may have been moved together."""
    settings: dict[str, Any] = json.loads((run / adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return settings | {"base_model_name_or_path": findable(base_folder(run))}


def _head(run: Path, name: str) -> Tensor:
    from safetensors.torch import load_file

    from hydra_ppo.model.saving import HEADS

    return load_file(run / HEADS)[f"{name}.weight"]


# -- both ----------------------------------------------------------------------------------------------------------------


def _merged(run: Path, adapter: str | None, dtype: str) -> PreTrainedModel:
    """Return the unquantised base of a run with one adapter added to its weights.

    LoRA deltas cannot be added to 4-bit or 8-bit weights without rounding them away: the base is loaded whole.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hydra_ppo.compat import dequantised, dtype_option
    from hydra_ppo.model.adapters import check_fit
    from hydra_ppo.model.loading import DTYPES
    from hydra_ppo.model.whole import load_whole, saying_why, tensor_shapes

    wanted = DTYPES.get(dtype)
    options = dtype_option("auto" if wanted is None else wanted)
    name = base_folder(run)
    with saying_why(name):
        base = load_whole(AutoModelForCausalLM, name, f"run={str(run)!r}, its base {name!r}", **options)
    if getattr(base, "is_quantized", False):
        base = dequantised(base, wanted or torch.bfloat16)
    if adapter is None:
        return base
    adapted = PeftModel.from_pretrained(base, run / adapter)  # which would leave fresh what the folder lacks
    check_fit(adapted, "default", run / adapter, tensor_shapes(run / adapter / "adapter_model.safetensors"))
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged


def _other_tokens(folder: Path | None, output: Path) -> list[str]:
    """Say where a tokenizer that was written is not read as the run reads its own.

    Beside a config.json of some families (Qwen2 is one) transformers 5 takes the family's tokenizer class, whatever the files
    say of themselves.
    """
    if folder is None or not (output / "tokenizer_config.json").is_file():
        return []
    try:
        ours, theirs = _tokenizer(folder), _tokenizer(output)
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


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"run={str(folder)!r} gives no tokenizer: {reason}; copy the tokenizer's files into it.") from error
