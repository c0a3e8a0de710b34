"""tdpass completion: what a shell needs to complete verbs, options and recipes."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tdpass.cli.arguments import Parser, Verbs, add_verb
from tdpass.cli.output import Output
from tdpass.methods.recipe import names as recipes

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


@dataclass(frozen=True)
class _Option:
    """An option of a verb: its long name, what it is for, and the values it has to choose from."""

    name: str
    help: str
    values: Sequence[str]
    bare: bool


def _options(parser: Parser) -> list[_Option]:
    # argparse has no other list of them
    actions = [action for action in parser._actions if action.option_strings]  # noqa: SLF001
    found = [
        _Option(name, _said(action, parser), list(map(str, action.choices or ())), action.nargs == 0)
        for action in actions
        for name in action.option_strings
        if name.startswith("--")
    ]
    return sorted(found, key=lambda option: option.name)


def _said(action: argparse.Action, parser: Parser) -> str:
    """What an option is for, as `--help` says it."""
    return str(action.help or "") % {**vars(action), "prog": parser.prog}


def _words(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def _bash(parsers: Mapping[str, Parser]) -> str:
    options = {verb: _options(parser) for verb, parser in parsers.items()}
    names = "\n".join(
        f"    {verb}) options={_words(option.name for option in found)} ;;" for verb, found in options.items()
    )
    values = "\n".join(
        f'    "{verb} {option.name}") words={_words(option.values)} chosen=1 ;;'
        for verb, found in options.items()
        for option in found
        if option.values
    )
    return f"""_tdpass() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  local options="" words="" chosen=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {_words(parsers)} -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{names}
  esac
  if [ "${{COMP_WORDS[1]}}" = train ]; then words={_words(recipes())}; fi
  if [ "${{COMP_WORDS[1]}}" = completion ]; then words={_words(SHELLS)}; fi
  case "${{COMP_WORDS[1]}} $before" in
{values}
  esac
  if [ -n "$chosen" ]; then COMPREPLY=($(compgen -W "$words" -- "$word")); return; fi
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *) COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _tdpass tdpass"""


def _fish(parsers: Mapping[str, Parser]) -> str:
    lines = [
        f"complete -c tdpass -n __fish_use_subcommand -f -a {verb} -d {shlex.quote(parser.description or '')}"
        for verb, parser in parsers.items()
    ]
    for verb, parser in parsers.items():
        lines += [_fish_option(verb, option) for option in _options(parser)]
    lines += [f"{_fish_verb('train')} -a {_words(recipes())}"]
    return "\n".join([*lines, f"{_fish_verb('completion')} -f -a {_words(SHELLS)}"])


def _fish_verb(verb: str) -> str:
    return f"complete -c tdpass -n '__fish_seen_subcommand_from {verb}'"


def _fish_option(verb: str, option: _Option) -> str:
    takes = "" if option.bare else " -r"
    values = f" -f -a {_words(option.values)}" if option.values else ""
    return f"{_fish_verb(verb)} -l {option.name[2:]}{takes}{values} -d {shlex.quote(option.help)}"
