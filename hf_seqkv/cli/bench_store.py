"""`seqkv bench store`: the time to a first token that a stored prefix saves."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import (
    add_count,
    add_model_option,
    add_option_argument,
    add_output_arguments,
    chosen_options,
    load_model,
    positive,
    show,
)

FORMS = ("hot", "exact", "sequence")
LEARNED_FROM, LEARNED_AT_ONCE = "jargon_file", 2048  # tables of `exact`, without a calibration: text, tokens a prompt


def add(pieces) -> None:
    parser = pieces.add_parser(
        "store",
        help="time to first token with a stored prefix",
        description="Store a prefix in every form, then time the first token of a prompt that begins with it.",
    )
    add_model_option(parser)
    parser.add_argument("--forms", nargs="+", default=FORMS[:2], choices=FORMS, help="(default: hot exact)")
    add_count(parser, "--tokens", 4096, "of the stored prefix")
    add_count(parser, "--more", 32, "that follow it")
    add_option_argument(parser)
    parser.add_argument("--directory", type=Path, metavar="DIR", help="where stores are made, for a while")
    parser.add_argument("--threads", type=positive, metavar="N", help="(default: torch's)")
    parser.add_argument("--seconds", type=positive, default=10, metavar="S", help="for each way, 5 calls at least (10)")
    add_output_arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Measure, print the tables on stderr, and JSON if asked.

    Raises:
        ConfigError: The text is too short, or a form cannot be had with these options.
        SeqKVError: The model or a calibration cannot be had.
    """
    import torch

    from ..eval import bench_store, bench_timing, passages

    if args.threads:
        torch.set_num_threads(args.threads)
    options = chosen_options(args)
    model, tokenizer, description = load_model(args.model, args.gguf_file, args.dtype)
    ids = passages.held_out(tokenizer, args.tokens + args.more)
    others = ()
    if "exact" in args.forms and "calibration" not in options:
        text = torch.tensor(tokenizer(passages.read(LEARNED_FROM), verbose=False)["input_ids"])
        others = [x[None] for x in text.split(LEARNED_AT_ONCE)]
    result = {"command": args.command, "machine": bench_timing.machine(), "threads": torch.get_num_threads()}
    result |= {"model": description, "options": {name: str(value) for name, value in options.items()}}
    result |= bench_store.measure(
        model, ids, args.tokens, list(args.forms), options, args.seconds, args.directory, others
    )
    show(args, bench_store.table(result), result)
    return 0
