"""What several verbs take and give: a cache's options, a model, texts, counts, a chart; a table and JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..config import SeqKVConfig
from ..errors import ConfigError, SeqKVError

TEXTS = ("jargon_file", "king_james")  # of the package


def add_option_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--option",
        dest="options",
        metavar="NAME=VALUE",
        type=pair,
        action="append",
        default=[],
        help="a SeqKVConfig field, such as key_bits=3 or calibration=DIR; may be repeated",
    )


def pair(text: str) -> tuple[str, Any]:
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


def positive(text: str, least: int = 1) -> int:
    """A whole number of at least 1, as argparse's `type`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def several(text: str) -> int:
    """The same of at least 2: for counts of which quartiles or a standard error are taken."""
    return positive(text, least=2)


def number(text: str) -> float:
    """Finite and not negative, as argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def step(text: str) -> int | str:
    """A sequence codec's step, or the name of a preset, as argparse's `type`."""
    return int(text) if text.removeprefix("-").isdecimal() else text


def add_count(parser: argparse.ArgumentParser, name: str, default: int, help_text: str, kind=positive) -> None:
    parser.add_argument(name, type=kind, default=default, metavar="N", help=f"{help_text} ({default})")


def add_output_arguments(parser: argparse.ArgumentParser, chart: str | None = None) -> None:
    """For `show` and, where there is a chart of such a name, for `check_plot`."""
    if chart:
        parser.add_argument("--plot", metavar="FILE", help=f"write a chart, such as {chart}")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, the last line of stdout")


def show(args: argparse.Namespace, table: str, result: dict) -> None:
    """A table for people on stderr, JSON on stdout where asked for."""
    print(table, file=sys.stderr)
    if args.json:
        print(json.dumps(result))


def check_plot(path: str | None) -> None:
    """Before the work, not after it.

    Raises:
        ConfigError: There is no directory to write `--plot` to.
        SeqKVError: matplotlib is missing.
    """
    from ..eval.extras import require

    if path:
        require("matplotlib")
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise ConfigError(f"--plot {path}: there is no such directory; create it or choose another")


def read_texts(paths: list[Path]) -> dict[str, str]:
    """Contents of `--texts` by path.

    Raises:
        ConfigError: A file cannot be read, or is not UTF-8.
    """
    try:
        return {str(path): path.read_text(encoding="utf-8") for path in paths}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts: {error}; give readable UTF-8 text files") from error


def add_texts_argument(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Of verbs that call `chosen_texts`."""
    default = f"(default: the package's {' and '.join(TEXTS)})"
    parser.add_argument("--texts", nargs="+", type=Path, metavar="FILE", help=f"{help_text} {default}")


def chosen_texts(args: argparse.Namespace) -> dict[str, str]:
    """Contents of `--texts` by path, or those of the package by name.

    Raises:
        ConfigError: A file cannot be read, or is not UTF-8.
    """
    from ..eval import passages

    return read_texts(args.texts) if args.texts else {name: passages.read(name) for name in TEXTS}


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """`--model`, and how `load_model` loads it."""
    parser.add_argument("--model", default="demo", help="directory or Hub repository (default: the demo's model)")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How `load_model` loads; which model is the verb's own argument."""
    parser.add_argument("--gguf-file", help="GGUF file in MODEL, for a model in that format")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of weights (float32)")


def load_model(name: str, gguf_file: str | None, dtype: str):
    """A causal LM, its tokenizer, and a line on where they came from.

    Args:
        name: Directory or Hub repository, or `"demo"` for the demo's model.

    Raises:
        SeqKVError: It cannot be had.
    """
    import torch

    if name == "demo":
        from ..eval import smollm2

        return smollm2.load(getattr(torch, dtype))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **options)
        return model.eval(), AutoTokenizer.from_pretrained(name, **options), "/".join([name, *options.values()])
    except OSError as error:
        raise SeqKVError(f"cannot load {name}: {error}") from error
