"""`hydra-ppo push`: a role of a run, written as `export` writes it, with a card, into a folder or to the hub.

Pushed are weights, configs, the tokenizer and the card, by name; no optimizer state, data, samples or log ever is.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hydra_ppo.cli.aside import check_empty, whole_or_nothing
from hydra_ppo.cli.choices import EXPORTED_ROLES, ExportedRole
from hydra_ppo.cli.parser import Parser, check_folder, check_run
from hydra_ppo.cli.saved import base_if_here, beside, check_saved
from hydra_ppo.config.reading import read_yaml
from hydra_ppo.data.sources import local_path
from hydra_ppo.errors import ConfigError, HydraError
from hydra_ppo.runs.contents import CONFIG, STATE, TOKENIZER_FILES, TOKENIZER_FOLDER

CARD = "README.md"
CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
PUSHED = (
    *(CARD, *CONFIGS, "adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", *TOKENIZER_FILES, "tokenization_*.py", "*.tiktoken", "tokenizer.model.v*"),
    f"{TOKENIZER_FOLDER}/*.jinja",
)
"""Names of all that is ever pushed."""
OWN = (CARD, ".gitattributes")
"""What may lie in a repo and is written anew, or belongs to the hub."""
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def push(arguments: list[str]) -> None:
    """Read the arguments of `hydra-ppo push`, and do it."""
    parser = Parser("push", "Push a role of a run to the hub, with a card: an adapter, or the model with --merged.")
    parser.add_argument("run", metavar="RUN", type=local_path, help="Run folder of ppo or sft, or a checkpoint.")
    parser.add_argument("--repo", required=True, metavar="NAME/REPO", help="Repo on the hub; made where it is not there.")
    parser.add_argument("--role", choices=EXPORTED_ROLES, default="actor", help="reward and critic become classifiers.")
    parser.add_argument("--merged", action="store_true", help="Push the whole model, and not the adapter alone.")
    parser.add_argument(
        "--base", metavar="NAME/REPO", help="Where the base is on the hub, if the run has it from a folder; taken at its word."
    )
    parser.add_argument("--private", action="store_true", help="Make the repo a private one.")
    parser.add_argument(
        "--output", type=local_path, metavar="DIR", help="Write what would be pushed to this folder, and push nothing."
    )
    options = parser.parse_args(arguments)
    check_run(options.run)
    for name in ("repo", "base"):
        _check_name(name, getattr(options, name))
    if options.output is not None:
        if options.private:
            raise ConfigError("--private is about a repo and --output writes a folder; leave one out.")
        check_folder("output", options.output)
        check_empty("output", options.output)
        with whole_or_nothing(options.output) as aside:
            notes = build(options.run, aside, options.repo, role=options.role, merged=options.merged, base=options.base)
        _print([*notes, f"Wrote what would be pushed to {options.output}; nothing was pushed."])
        return
    hub = _Hub(options.repo)
    place = (beside(options.run, STATE) or options.run).resolve().parent  # a disk that has room for models
    try:
        made = tempfile.TemporaryDirectory(prefix=".writing-push-", dir=place)
    except OSError as error:
        raise ConfigError(f"{place} cannot be written ({error.strerror}), where the model is put together.") from None
    with made as folder:
        model = Path(folder) / "model"
        notes = build(options.run, model, options.repo, role=options.role, merged=options.merged, base=options.base)
        address = hub.upload(model, options.private)
    _print([*notes, f"Pushed {options.role} to {address}"])


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def _check_name(option: str, name: str | None) -> None:
    if name is not None and (REPO.fullmatch(name) is None or ".." in name or "--" in name or name.endswith(".git")):
        raise ConfigError(f"--{option}={name!r} is no name on the hub; write NAME/REPO.")


def build(
    run: Path, folder: Path, repo: str, *, role: ExportedRole = "actor", merged: bool = False, base: str | None = None
) -> list[str]:
    """Write what is pushed into a folder; return what a user should know, a line each.

    Args:
        run: folder of a finished sft or ppo run, or a checkpoint.
        folder: empty, or not there.
        repo: what the card calls it.
        base: the base's name on the hub; None takes the run's, where that is one.

    Memory: that of `export_role`.

    Raises:
        ConfigError: see `export_role`; also where an adapter's base is a folder here, which nobody else has.
    """
    manifest = check_saved(run, needs_base=merged)
    here, given = base_if_here(run), manifest["base"]
    on_hub = base or (None if given["relative"] or Path(given["name_or_path"]).is_dir() else given["name_or_path"])
    if not merged and on_hub is None:
        raise ConfigError(
            f"run={str(run)!r} stands on a base in a folder, {Path(given['name_or_path']).name!r}, which nobody else has; say "
            "with --base NAME/REPO where it is on the hub, or push the whole model with --merged."
        )
    from hydra_ppo.cli.export import export_role

    *notes, _ = export_role(run, folder, role=role, adapter_only=not merged)  # the last one is how to load it from here
    notes = [note.replace(str(folder), repo) for note in notes]
    left_out = _leave_out(folder)  # said here, and not in the card
    _without_paths(folder, None if merged else on_hub)
    _write_card(run, folder, repo, role, merged, on_hub, Path(given["name_or_path"]).name, manifest, notes)
    _check_private(folder, [run.absolute(), run.resolve(), *([Path(here).resolve()] if here and Path(here).is_dir() else [])])
    return [*notes, *left_out]


def _leave_out(folder: Path) -> list[str]:
    """Remove what is not of the kind that is pushed: a run's folders may hold what somebody put there."""
    notes = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and (path.is_symlink() or not any(fnmatch(name, pattern) for pattern in PUSHED)):
            path.unlink()
            notes.append(f"left out: {name}, which is no part of a model")
    return notes


def _without_paths(folder: Path, base: str | None) -> None:
    """Drop paths of this machine from configs, and name the base where others find it."""
    for name in CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        before = json.loads(path.read_text(encoding="utf-8"))
        after = {key: value for key, value in before.items() if not _is_path(key, value)}
        if name == "adapter_config.json":
            after["base_model_name_or_path"] = base
        if after != before:
            path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_path(key: str, value: object) -> bool:
    if not isinstance(value, str) or "\n" in value:
        return False
    if key in ("_name_or_path", "name_or_path"):
        return True
    return any(kind(value).is_absolute() and len(kind(value).parts) > 2 for kind in (PurePosixPath, PureWindowsPath))


def _write_card(
    run: Path,
    folder: Path,
    repo: str,
    role: ExportedRole,
    merged: bool,
    base: str | None,
    base_name: str,
    manifest: Mapping[str, Any],
    notes: Sequence[str],
) -> None:
    from hydra_ppo.cli.export import load_tokenizer_of
    from hydra_ppo.cli.model_card import Pushed, model_card
    from hydra_ppo.cli.saved import run_ends, tokenizer_folder
    from hydra_ppo.model.whole import causal_class, read_config
    from hydra_ppo.report.record import read_runs
    from hydra_ppo.runs.outcomes import outcomes

    own = (folder / "tokenizer_config.json").is_file()
    source = folder if own else tokenizer_folder(run)
    tokenizer = load_tokenizer_of(source) if source is not None else None
    ends = run_ends(manifest, tokenizer) if tokenizer is not None else tuple(manifest.get("end_ids") or ())
    whole = str(folder) if merged else base_if_here(run)
    causal = role in ("actor", "actor_ema")
    pushed = Pushed(
        repo=repo,
        role=role,
        base=base,
        base_name=base_name,
        merged=merged,
        kind=causal_class(read_config(whole)).__name__ if causal and whole else "AutoModelForCausalLM",
        tokenizer=own,
        chat=tokenizer is not None and tokenizer.chat_template is not None,
        ends=ends,
        end=str(tokenizer.convert_ids_to_tokens(ends[0])) if tokenizer is not None and ends else "",
        pad=tokenizer.pad_token_id if tokenizer is not None else None,
    )
    owner = beside(run, STATE)
    record = read_runs([owner])[0] if owner is not None else None
    found = []
    if record is not None:
        last = _step_of(run) if owner != run else None
        upto = [line for line in record.records if last is None or line.get("step", 0) <= last]
        found = outcomes(upto, record.summary if last is None else {})
    data = _data(owner) if owner is not None else []
    (folder / CARD).write_text(model_card(pushed, record, data, found, notes), encoding="utf-8")


def _data(owner: Path) -> list[str]:
    """Return what a run read, as its config has it: with dots before what lies on this machine."""
    content = read_yaml(owner / CONFIG).get("data") if (owner / CONFIG).is_file() else None
    return [str(content[name]) for name in ("train", "eval") if isinstance(content, dict) and content.get(name)]


def _step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, which its name ends in."""
    return int(re.sub(r"\D", "", checkpoint.resolve().name) or 0)


def _check_private(folder: Path, places: Sequence[Path]) -> None:
    """Refuse to go on where a text that is pushed names a place of this machine.

    Raises:
        ConfigError: naming the file.
    """
    homes = [str(Path.home())] if len(Path.home().parts) > 2 else []
    for name in (CARD, *CONFIGS):
        text = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
        for place in (*map(str, places), *homes):
            if place in text:
                raise ConfigError(
                    f"{name} would tell others of {place!r}; use export, and push by hand what you have looked at."
                )


class _Hub:
    """A repo on the hub, which is asked before minutes are spent on a model."""

    def __init__(self, repo: str) -> None:
        """Ask the hub who pushes.

        Raises:
            ConfigError: where there is no token.
            HydraError: where the hub cannot be reached, or refuses the token.
        """
        from huggingface_hub import HfApi, get_token

        self._repo = repo
        if get_token() is None:
            raise ConfigError("push needs a token of the hub; set HF_TOKEN or run hf auth login. --output DIR needs none.")
        self._api = HfApi()
        self._ask("whoami", self._api.whoami)

    def upload(self, folder: Path, private: bool) -> str:
        """Make the repo where there is none, and upload a folder; return its address.

        Raises:
            ConfigError: where a repo is there that is public, or holds what would lie beside this.
            HydraError: where the hub refuses or goes away.
        """
        repo = self._repo
        address = self._ask("create_repo", self._api.create_repo, repo, private=private or None, exist_ok=True)
        if private and not self._ask("model_info", self._api.model_info, repo).private:
            raise ConfigError(f"--private: {repo} is there and public; choose another repo, or make it private on the hub.")
        written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        others = set(self._ask("list_repo_files", self._api.list_repo_files, repo)) - written - set(OWN)
        if others:
            raise ConfigError(
                f"{repo} holds {', '.join(sorted(others)[:3])}, which would lie beside this model and be loaded with it; "
                "choose another repo, or remove that on the hub."
            )
        from hydra_ppo import __version__

        said = f"hydra-ppo push, {__version__}"
        options = {"repo_id": repo, "folder_path": folder, "allow_patterns": list(PUSHED), "commit_message": said}
        self._ask("upload_folder", self._api.upload_folder, **options)
        return str(address)

    def _ask(self, what: str, call: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except Exception as error:  # of a client that changes with the version of the package
            status = getattr(getattr(error, "response", None), "status_code", None)
            said = " ".join(str(getattr(error, "server_message", None) or "").split())[:160]
            why = f"the hub answers {status}" if status else f"the hub cannot be reached, {type(error).__name__}"
            raise HydraError(
                f"push to {self._repo} failed at {what} ({why}{f': {said}' if said else ''}); look at the token's rights and "
                "the network, and run it again, or use --output DIR."
            ) from error
