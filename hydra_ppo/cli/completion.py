"""`hydra-ppo completion SHELL`: what a shell completes, written out, so that pressing Tab starts no Python.

Commands, the settings of sft and ppo with the words that they may be, and the options of the other commands as their own help
names them.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping

from hydra_ppo.cli.parser import Parser
from hydra_ppo.config.reading import choices, settings_of
from hydra_ppo.config.settings import PPOConfig, SFTConfig

CONFIGS = {"sft": SFTConfig, "ppo": PPOConfig}
SHELLS = ("bash", "zsh", "fish")
OWN = ("--help", "--print-config", "--dry-run", "--resume", "--traceback")
"""Options of sft and ppo that are no settings."""

BASH = """# hydra-ppo: completion for bash. Use: source <(hydra-ppo completion bash)
_hydra_ppo() {
  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}"
  local IFS=$'\\n'
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(IFS=' ' compgen -W "@COMMANDS@" -- "$current"))
    return
  fi
  case "$command $before" in
@VALUES@
  esac
  case "$current" in
  -*)
    case "$command" in
@OPTIONS@
    esac ;;
  *) COMPREPLY=($(compgen -f -- "$current")) ;;
  esac
}
complete -o filenames -F _hydra_ppo hydra-ppo
"""

ZSH = """# hydra-ppo: completion for zsh. Use: source <(hydra-ppo completion zsh), after compinit.
autoload -U +X bashcompinit && bashcompinit
"""


def completion(arguments: list[str], run: Mapping[str, Callable[[list[str]], object]]) -> None:
    """Read the arguments of `hydra-ppo completion`, and print the script.

    Args:
        run: what runs each command, which is asked for its help.
    """
    parser = Parser("completion", "Print what a shell completes; source it in the shell's start file.")
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish.")
    options = parser.parse_args(arguments)
    print(script(options.shell, options_by_command(run)), end="")


def script(shell: str, flags: Mapping[str, list[str]]) -> str:
    """Return what a shell is to source.

    Args:
        flags: options of every command.
    """
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](flags, values_by_command())


def options_by_command(run: Mapping[str, Callable[[list[str]], object]]) -> dict[str, list[str]]:
    """Return the options of every command: of sft and ppo all settings, of the others what their own help names."""
    found = {command: sorted([*OWN, *(f"--{name}" for name in settings_of(kind))]) for command, kind in CONFIGS.items()}
    return {name: found.get(name) or _options_of(run[name]) for name in sorted(run)}


def values_by_command() -> dict[str, dict[str, list[str]]]:
    """Return the words that settings of sft and ppo may be, by command and option."""
    return {
        command: {f"--{name}": words for name, setting in settings_of(kind).items() if (words := _words(setting.hint))}
        for command, kind in CONFIGS.items()
    }


def _words(hint: object) -> list[str]:
    return ["true", "false"] if hint is bool else choices(hint)


def _options_of(command: Callable[[list[str]], object]) -> list[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        command(["--help"])
    return sorted({*re.findall(r"(?<![\w-])--[a-z][\w.-]*", shown.getvalue()), "--help"})


def _bash(flags: Mapping[str, list[str]], values: Mapping[str, Mapping[str, list[str]]]) -> str:
    option_lines = [
        f'    {name}) COMPREPLY=($(IFS=" " compgen -W "{" ".join(words)}" -- "$current")) ;;' for name, words in flags.items()
    ]
    value_lines = [
        f'  "{command} {option}") COMPREPLY=($(IFS=" " compgen -W "{" ".join(words)}" -- "$current")); return ;;'
        for command, options in values.items()
        for option, words in options.items()
    ]
    script = BASH.replace("@COMMANDS@", " ".join(flags))
    return script.replace("@VALUES@", "\n".join(value_lines)).replace("@OPTIONS@", "\n".join(option_lines))


def _zsh(flags: Mapping[str, list[str]], values: Mapping[str, Mapping[str, list[str]]]) -> str:
    return ZSH + _bash(flags, values).split("\n", 1)[1]


def _fish(flags: Mapping[str, list[str]], values: Mapping[str, Mapping[str, list[str]]]) -> str:
    lines = ["# hydra-ppo: completion for fish. Use: hydra-ppo completion fish | source"]
    lines.append(f"complete -c hydra-ppo -f -n __fish_use_subcommand -a '{' '.join(flags)}'")
    for command, options in flags.items():
        seen = f"-n '__fish_seen_subcommand_from {command}'"
        for option in options:
            words = values.get(command, {}).get(option)
            more = f" -x -a '{' '.join(words)}'" if words else ""
            lines.append(f"complete -c hydra-ppo {seen} -l {option.removeprefix('--')}{more}")
    return "\n".join(lines) + "\n"
