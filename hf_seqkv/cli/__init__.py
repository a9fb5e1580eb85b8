"""The `seqkv` command: one file a verb.

A verb's module has `add_parser(subparsers)`, which calls `set_defaults(run=function)`; `function(args)` returns the
exit status. These modules import torch and transformers only inside functions, so that `seqkv --help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys

from .. import __version__
from ..errors import SeqKVError

VERBS = ("bench", "calibrate", "demo", "inspect", "run", "store")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seqkv", description="A compressed KV cache for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=f"seqkv {__version__}")
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        importlib.import_module(f".{verb}", __name__).add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `seqkv` with `argv`, by default the process's own.

    Returns:
        Exit status: 0, or 1 after a `SeqKVError`, which is printed on stderr.

    Raises:
        SystemExit: With status 2 where the arguments cannot be parsed; 0 after `--help` and `--version`.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.command = shlex.join(["seqkv", *argv])
    try:
        return args.run(args)
    except SeqKVError as error:
        print(f"seqkv: error: {error}", file=sys.stderr)
        return 1
