"""tdpass completion: what a shell needs to complete verbs, options and recipes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from tdpass.cli.arguments import Parser, Verbs, add_verb
from tdpass.cli.output import Output
from tdpass.methods.recipe import names

SHELLS = ("bash", "fish", "zsh")


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    example = "tdpass completion bash > ~/.local/share/bash-completion/completions/tdpass"
    parser = add_verb(verbs, "completion", run, "print what a shell needs to complete this command", example)
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    parser.set_defaults(parsers=verbs.choices)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Print the script."""
    script = _fish(arguments.parsers) if arguments.shell == "fish" else _bash(arguments.parsers)
    if arguments.shell == "zsh":
        script = f"autoload -U +X bashcompinit && bashcompinit\n{script}"
    out.show({"script": script}, lambda width: script.splitlines())
    return 0


def _options(parser: Parser) -> list[str]:
    # argparse has no other list of them
    found = [option for action in parser._actions for option in action.option_strings]  # noqa: SLF001
    return sorted(option for option in found if option.startswith("--"))


def _bash(parsers: Mapping[str, Parser]) -> str:
    cases = "\n".join(
        f"    {verb}) options={' '.join(_options(parser))!r} ;;" for verb, parser in parsers.items()
    )
    return f"""_tdpass() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" options="" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {" ".join(parsers)!r} -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [ "${{COMP_WORDS[1]}}" = train ]; then words={" ".join(names())!r}; fi
  if [ "${{COMP_WORDS[1]}}" = completion ]; then words={" ".join(SHELLS)!r}; fi
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _tdpass tdpass"""


def _fish(parsers: Mapping[str, Parser]) -> str:
    lines = [f"complete -c tdpass -n __fish_use_subcommand -f -a {verb}" for verb in parsers]
    for verb, parser in parsers.items():
        lines += [
            f"complete -c tdpass -n '__fish_seen_subcommand_from {verb}' -l {option.removeprefix('--')}"
            for option in _options(parser)
        ]
    lines += [f"complete -c tdpass -n '__fish_seen_subcommand_from train' -a '{' '.join(names())}'"]
    return "\n".join(
        [*lines, f"complete -c tdpass -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'"]
    )
