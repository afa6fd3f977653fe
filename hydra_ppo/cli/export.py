"""Writes the actor in a form that other programs load: merged into an unquantised base, or the adapter alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from hydra_ppo.cli.dry_run import check_model
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.manifest import MANIFEST, base_folder

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)


def export_actor(run: str | Path, output: str | Path, *, adapter_only: bool = False) -> None:
    """Write the actor of a run (of the SFT policy, where there is no actor yet) for vLLM or transformers.

    Args:
        run: folder of a finished sft or ppo run.
        output: new folder: config, safetensors weights and tokenizer; or a PEFT adapter folder with `adapter_only`.
        adapter_only: leave the base out.

    Memory: the unquantised base once, on the CPU (nothing with `adapter_only`).

    Raises:
        ConfigError: when `run` holds no whole model, or `output` is not empty; nothing is made then.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, PreTrainedModel

    from hydra_ppo.compat import dequantised, dtype_option

    run, output = Path(run), Path(output)
    if not (run / MANIFEST).is_file():
        raise ConfigError(f"run={str(run)!r} holds no {MANIFEST}; name the folder of a finished sft or ppo run.")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"output={str(output)!r} is not empty; choose another folder.")
    adapter = next((name for name in ("actor", "sft") if (run / name / "adapter_config.json").is_file()), None)
    if adapter is None and adapter_only:
        raise ConfigError(f"run={str(run)!r} trained the base itself and has no adapter; export it without --adapter-only.")
    check_model("run", str(run))
    base_name = base_folder(run)
    if adapter is not None and adapter_only:
        output.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run / adapter, output, dirs_exist_ok=True)
    else:
        # LoRA deltas cannot be added to 4-bit or 8-bit weights without rounding them away: the base is loaded whole.
        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_name, **dtype_option("auto"), use_safetensors=True)
        if getattr(base, "is_quantized", False):
            base = dequantised(base, torch.bfloat16)
        merged = PeftModel.from_pretrained(base, run / adapter).merge_and_unload() if adapter else base
        merged.save_pretrained(output)
    for name in TOKENIZER_FILES:
        if (run / name).is_file():
            shutil.copy2(run / name, output / name)
