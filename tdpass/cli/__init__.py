"""The command line: `tdpass VERB`.

The verbs are inspect, plan, compress, train, map, deploy, verify, bench, report, doctor and completion.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from tdpass.cli import (
    bench,
    completion,
    compress,
    deploy,
    doctor,
    inspect,
    map_arrays,
    plan,
    report,
    silence,
    train,
    verify,
)
from tdpass.cli.arguments import Parser, as_options
from tdpass.cli.isolation import Limits
from tdpass.cli.output import Output
from tdpass.cli.values import CommandLineError
from tdpass.errors import TdpassError
from tdpass.machine import installed_version
from tdpass.views.units import plain

REFUSED, WRONG_USAGE, UNEXPECTED, INTERRUPTED, PIPE_CLOSED = 1, 2, 70, 130, 141
_LESS = "use a smaller model or fewer --samples, or allow more where a limit is set (--isolate-memory)"
_EPILOG = """\
shortest use: tdpass compress model.onnx --budget macs=0.4 --data calib.npz -o small.onnx

exit codes:
  0    done
  1    the command was understood, but what it names does not work: a file, a
       model, data, a budget that cannot be met; or a check failed
  2    the command itself is wrong, whatever it names: an unknown verb or option,
       a value that the option does not allow, an option that is missing
  3    training went through and left a network that is no use; its files are there
  70   an error of tdpass itself
  130  interrupted
"""
_VERBS = (inspect, plan, compress, train, map_arrays, deploy, verify, bench, report, doctor, completion)


def main(argv: Sequence[str] | None = None, *, contained: bool = False) -> int:
    """Run one verb; returns the exit code.

    The codes are those of the epilog below.  Every error is one line on stderr, after the traceback where
    `--debug` is given. `contained`: the process has the limits of
    `--isolate` already.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser().parse_args(words)
        if arguments.isolate and not contained:
            return Limits(arguments.isolate_seconds, arguments.isolate_memory).run(
                words, _written_to(arguments)
            )
        out = Output(json=arguments.json, quiet=arguments.quiet, stdout=sys.stdout, stderr=sys.stderr)
        # whatever a model's own code prints must not end up among the results
        with contextlib.redirect_stdout(sys.stderr), silence.libraries(arguments.debug):
            code = arguments.run(arguments, out)
        out.flush()
        return int(code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        print("\ntdpass: interrupted; files are written whole or not at all", file=sys.stderr)
        return INTERRUPTED
    except TdpassError as error:
        return _fail(
            as_options(str(error)),
            WRONG_USAGE if isinstance(error, CommandLineError) else REFUSED,
            "--debug" in words,
        )
    except MemoryError as error:
        return _fail(
            f"there is not enough memory for this ({str(error) or 'none was left'}); {_LESS}",
            REFUSED,
            "--debug" in words,
        )
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return _fail(f"{what}{error.strerror or error}", REFUSED, "--debug" in words)
    # the last line of defence: a user gets one line, not a traceback
    except Exception as error:  # noqa: BLE001
        hint = "" if "--debug" in words else "; run again with --debug for the traceback"
        return _fail(f"{type(error).__name__}: {error}{hint}", UNEXPECTED, "--debug" in words)


def _written_to(arguments: argparse.Namespace) -> list[Path]:
    """The folder that a verb writes to."""
    output = getattr(arguments, "output", None)
    return [] if output is None else [Path(output).parent]


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"tdpass: error: {' '.join(plain(message).split())}", file=sys.stderr)
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="tdpass",
        description="Make neural networks smaller and faster by factoring their weights.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"tdpass {installed_version()}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in _VERBS:
        verb.add(verbs)
    return parser
