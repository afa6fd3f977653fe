"""What lies in a run folder, or in a checkpoint of one, for the commands that read finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_ppo.cli.flags import parse
from hydra_ppo.cli.model_files import check_adapters, check_model
from hydra_ppo.config.reading import read_yaml
from hydra_ppo.config.settings import PPOConfig, SFTConfig
from hydra_ppo.data.ends import find_ends
from hydra_ppo.errors import ConfigError
from hydra_ppo.model.manifest import MANIFEST, base_folder, read_manifest
from hydra_ppo.runs.contents import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_saved(run: Path, *, needs_base: bool = True) -> dict[str, Any]:
    """Check that a folder holds a whole model of this program, and return its `hydra.json`.

    Args:
        run: the folder.
        needs_base: whether its base has to be there too.

    Raises:
        ConfigError: naming what is missing.
    """
    if not (run / MANIFEST).is_file():
        raise ConfigError(f"run={str(run)!r} holds no {MANIFEST}; name the folder of a finished sft or ppo run.")
    if needs_base:
        check_model("run", str(run))
    else:
        check_adapters(f"run={str(run)!r}", run)
    return read_manifest(run)


def base_if_here(run: Path) -> str | None:
    """Return the base that a saved model stands on; None where a local one is not there."""
    try:
        return base_folder(run)
    except ConfigError:
        return None


def beside(run: Path, name: str) -> Path | None:
    """Return the folder that has file `name`: the run itself, or the run that a checkpoint belongs to."""
    places = [run, run.resolve().parent.parent] if run.resolve().parent.name == "checkpoints" else [run]
    return next((place for place in places if (place / name).is_file()), None)


def tokenizer_folder(run: Path) -> Path | None:
    """Return where the tokenizer of a run lies: with it, else with its base; None where there is none."""
    if (own := beside(run, "tokenizer_config.json")) is not None:
        return own
    base = base_if_here(run)
    return Path(base) if base is not None and (Path(base) / "tokenizer_config.json").is_file() else None


def run_config(run: Path, flags: Sequence[str] = ()) -> PPOConfig | SFTConfig:
    """Return the settings of a run, changed by flags; defaults where it holds none.

    Python code that comes with a model is run only where a flag says so, whatever the run did.

    Raises:
        ConfigError: naming the setting that is wrong.
    """
    folder = beside(run, CONFIG)
    safe = ["--model.trust_remote_code", "false"]
    unused = [] if folder else ["--run.output", str(run)]
    config_class: type[PPOConfig] | type[SFTConfig] = SFTConfig
    files = []
    if folder is not None:
        files = [str(folder / CONFIG)]
        config_class = PPOConfig if "steps" in read_yaml(folder / CONFIG) else SFTConfig
    config = parse(config_class, "", [*files, "--model.name_or_path", str(run), *unused, *safe, *flags]).config
    assert config is not None
    return config


def run_ends(manifest: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end an answer, the trained one first; of runs that did not write them down, the tokenizer's."""
    known = manifest.get("end_ids")
    return tuple(known) if known else find_ends(tokenizer).ids


def trained_quantization(run: Path, manifest: Mapping[str, Any]) -> str | None:
    """Return how the base was held when the run trained: int8, nf4 or fp4; None for plain weights, or where nobody said."""
    if "quantization" in manifest:
        found = manifest["quantization"]
    else:
        folder = beside(run, CONFIG)
        found = None if folder is None else (read_yaml(folder / CONFIG).get("model") or {}).get("quantization")
    return None if found is None else str(found)


def check_file(setting: str, path: Path | None) -> None:
    """Refuse a file to write that is there already, or whose folder is not.

    Raises:
        ConfigError: naming it.
    """
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{setting}={str(path)!r} is there already; choose another file, or remove it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{setting}={str(path)!r} cannot be made, there is no folder {str(path.parent)!r}; make it first.")
