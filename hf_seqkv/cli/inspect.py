"""`seqkv inspect`: what is here, without running a model; the table is the output."""

from __future__ import annotations

import argparse
import json


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show this environment: versions, processor, kernel, directories",
        description="Show what is here, without running a model.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--env", action="store_true", help="versions, processor, kernel, GPUs, directories")
    parser.add_argument("--json", action="store_true", help="print JSON instead, on one line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..eval import environment

    found = environment.describe()
    print(json.dumps(found) if args.json else environment.table(found))
    return 0
