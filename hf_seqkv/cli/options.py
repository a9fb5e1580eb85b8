"""`--option NAME=VALUE`, for the verbs that make a cache."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..config import SeqKVConfig


def add_option_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option",
        dest="options",
        metavar="NAME=VALUE",
        type=_pair,
        action="append",
        default=[],
        help="a SeqKVConfig field, such as key_bits=3 or calibration=DIR; may be repeated",
    )


def _pair(text: str) -> tuple[str, Any]:
    """Name and value; the value is JSON, or text where it is not JSON."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `--option` gave, checked.

    Raises:
        ConfigError: An option is unknown or its value invalid.
    """
    options = dict(args.options)
    SeqKVConfig.from_dict(options)
    return options
