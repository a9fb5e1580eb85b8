"""`seqkv bench ablation`: what each ingredient of the sequence codec is worth."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import (
    add_count,
    add_model_option,
    add_output_arguments,
    add_texts_argument,
    chosen_texts,
    load_model,
    read_texts,
    show,
)


def add(pieces) -> None:
    parser = pieces.add_parser(
        "ablation",
        help="the sequence codec without each of its ingredients",
        description="Fit the sequence codec with one ingredient left out at a time; compare rates at equal quality.",
    )
    add_model_option(parser)
    parser.add_argument("--fit", nargs="+", type=Path, required=True, metavar="FILE", help="UTF-8 texts to fit to")
    add_texts_argument(parser, "UTF-8 texts to judge by")
    add_count(parser, "--tokens", 32_768, "to fit to")
    add_count(parser, "--windows", 1, "windows a text to judge by")
    add_count(parser, "--window", 2048, "tokens a window")
    parser.add_argument("--seed", type=int, default=0, help="which windows are drawn (0)")
    add_output_arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Measure, print the table on stderr, and JSON if asked.

    Raises:
        ConfigError: Texts too short, or judged by what was fitted to.
        SeqKVError: The model cannot be had.
    """
    from ..eval import ablation, bench_timing, quality

    fitted, judged = list(read_texts(args.fit).values()), chosen_texts(args)
    model, tokenizer, description = load_model(args.model, args.gguf_file, args.dtype)
    plan = quality.Plan(args.windows, args.window)
    found = ablation.measure(model, tokenizer, fitted, judged, args.tokens, args.seed, plan)
    result = {"command": args.command, "machine": bench_timing.machine(), "model": description, "variants": found}
    show(args, ablation.table(found), result)
    return 0
