"""Arguments that several verbs take: a cache's options, a model, texts, a chart."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ..config import SeqKVConfig
from ..errors import ConfigError, SeqKVError


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


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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
