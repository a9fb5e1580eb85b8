"""`seqkv bench quality`: how close caches stay to dense, on any model and any text."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ConfigError
from .options import (
    add_count,
    add_model_option,
    add_output_arguments,
    add_texts_argument,
    check_plot,
    chosen_texts,
    load_model,
    pair,
    show,
    step,
)


def add(pieces) -> None:
    parser = pieces.add_parser(
        "quality",
        help="perplexity, divergence and agreement of caches against dense, on real text",
        description="Run caches in lock-step with the dense one over windows of text, and compare what they predict.",
    )
    add_model_option(parser)
    add_texts_argument(parser, "UTF-8 text files")
    parser.add_argument("--methods", nargs="*", metavar="NAME", help="turboquant-4, kivi-2, ... (default: all known)")
    parser.add_argument(
        "--method",
        dest="settings",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME:OPTION=VALUE,...",
        help="one more method, of this cache with SeqKVConfig fields; may be repeated",
    )
    parser.add_argument(
        "--calibration",
        type=_calibration,
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="one more method, a calibration, called 'hot' if not named; may be repeated",
    )
    parser.add_argument(
        "--sequence",
        dest="sequences",
        type=_sequence,
        action="append",
        default=[],
        metavar="DIR:PROFILE:STEP",
        help="one more method, a calibration's sequence codec: 'full' or 'light', at a step or preset; may be repeated",
    )
    add_count(parser, "--windows", 2, "windows a text")
    add_count(parser, "--window", 2048, "tokens a window")
    add_count(parser, "--prefill", 256, "tokens before the first scored one")
    add_count(parser, "--residual-length", 64, "last tokens that stay dense, at least")
    add_count(parser, "--n-sink", 4, "first tokens that stay dense", kind=int)
    add_output_arguments(parser, "quality.png")
    parser.set_defaults(run=_run)


def _setting(text: str) -> tuple[str, dict[str, Any]]:
    name, colon, options = text.partition(":")
    if not (name and colon and options):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:OPTION=VALUE,... such as mine:key_bits=4,value_bits=3")
    return name, dict(pair(option) for option in options.split(","))


def _calibration(text: str) -> tuple[str, dict[str, Any]]:
    name, equals, where = text.partition("=")
    return (name, {"calibration": where}) if equals else ("hot", {"calibration": text})


def _sequence(text: str) -> tuple[str, str, str | int]:
    where, colon, rest = text.partition(":full:") if ":full:" in text else text.partition(":light:")
    if not (where and colon and rest):
        raise argparse.ArgumentTypeError(f"{text!r} is not DIR:PROFILE:STEP such as out:full:balanced or out:light:-4")
    return where, colon.strip(":"), step(rest)


def _run(args: argparse.Namespace) -> int:
    """Measure, print the table on stderr, and the rest as asked.

    Raises:
        ConfigError: Options, lengths or names that cannot be, or a text that a calibration has seen.
        SeqKVError: The model or a calibration cannot be had.
    """
    from ..eval import bench_kernels, bench_timing, quality, quality_report

    plan = quality.Plan(args.windows, args.window, args.prefill, args.n_sink, args.residual_length)
    methods = _methods(args)
    check_plot(args.plot)
    texts = chosen_texts(args)
    model, tokenizer, description = load_model(args.model, args.gguf_file, args.dtype)
    result = {"command": args.command, "machine": bench_timing.machine(), "backend": bench_kernels.chosen_backend()}
    result |= {"model": description, "dtype": args.dtype}
    result |= quality.measure(model, tokenizer, texts, methods, plan)
    show(args, quality_report.table(result), result)
    if args.plot:
        quality_report.plot(result, args.plot)
    return 0


def _methods(args: argparse.Namespace) -> dict:
    """Methods by name, in the order asked for.

    Raises:
        ConfigError: A name that is not known or given twice, none at all, or an invalid option.
    """
    from ..calibration.artifact import SeqKVCalibration
    from ..eval import quality

    names = list(quality.METHODS) if args.methods is None else args.methods
    unknown = [name for name in names if name not in quality.METHODS]
    if unknown:
        raise ConfigError(
            f"--methods {unknown[0]}: not one of {', '.join(quality.METHODS)}; give settings with --method NAME:..."
        )
    given = [(name, quality.METHODS[name]) for name in names]
    given += [(name, quality.seqkv(**options)) for name, options in (*args.settings, *args.calibration)]
    loaded = {where: SeqKVCalibration.from_pretrained(where) for where, _, _ in args.sequences}
    given += [
        (f"sequence {profile} {step}", quality.sequence(loaded[where], profile, step))
        for where, profile, step in args.sequences
    ]
    names = [name for name, _ in given]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"methods {', '.join(names) or '(none)'}: give at least one, and each name once")
    return dict(given)
