"""`seqkv run SCRIPT`: an unmodified program, with "seqkv" as the cache of every `generate` that names no other."""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from ..errors import SeqKVError
from .options import add_option_argument, chosen_options


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "run",
        help="run an unmodified Python script with this cache",
        description="Run a Python script or module; model.generate() and pipelines that ask for no cache use seqkv.",
    )
    add_option_argument(parser)
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module name, as in `python -m`")
    parser.add_argument("script", metavar="SCRIPT", help="file or, with -m, module to run")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="arguments of the script")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the program; its `SystemExit` passes through.

    Raises:
        SeqKVError: There is no such script.
        ConfigError: An option is unknown or its value invalid.
    """
    options = chosen_options(args)
    if not (args.is_module or os.path.isfile(args.script)):
        raise SeqKVError(f"there is no script {args.script!r}; give the path of a Python file, or -m MODULE")
    from ..integration.default_cache import use_by_default

    use_by_default(**options)
    # As the interpreter would have set them up for the program.
    sys.argv = [args.script, *args.arguments]
    sys.path[0] = os.getcwd() if args.is_module else os.path.dirname(os.path.abspath(args.script))
    if args.is_module:
        runpy.run_module(args.script, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(args.script, run_name="__main__")
    return 0
