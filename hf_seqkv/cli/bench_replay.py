"""`seqkv bench replay`: sequences kept as token ids, how small they are and what restoring their cache costs."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from .options import (
    add_count,
    add_model_option,
    add_output_arguments,
    add_texts_argument,
    chosen_texts,
    load_model,
    positive,
    several,
    show,
)


def add(pieces) -> None:
    parser = pieces.add_parser(
        "replay",
        help="token ids in place of a cache: bits a token, and what restoring costs",
        description="Code texts as token ids, with the model and without, restore their caches, and time it.",
    )
    add_model_option(parser)
    add_texts_argument(parser, "UTF-8 text files")
    add_count(parser, "--tokens", 512, "first tokens of each text", kind=several)
    add_count(parser, "--repeats", 1, "of what runs a step a token, for each text")
    parser.add_argument("--threads", type=positive, metavar="N", help="(default: torch's)")
    add_output_arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Measure, print the table on stderr, and JSON if asked.

    Raises:
        ConfigError: A text cannot be read, or is too short.
        SeqKVError: The model cannot be had, or does not run twice alike.
    """
    import torch

    from ..eval import bench_replay, bench_timing

    texts = chosen_texts(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer, description = load_model(args.model, args.gguf_file, args.dtype)
    ids = {}
    for name, text in texts.items():
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) < args.tokens:
            raise ConfigError(f"{name} has {len(found)} tokens, --tokens asks for {args.tokens}; ask for fewer")
        ids[name] = torch.tensor(found[: args.tokens])
    result = {"command": args.command, "machine": bench_timing.machine(), "threads": torch.get_num_threads()}
    result |= {"model": description, "dtype": args.dtype, **bench_replay.measure(model, ids, args.repeats)}
    show(args, bench_replay.table(result), result)
    return 0
