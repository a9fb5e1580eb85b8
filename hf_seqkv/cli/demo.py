"""`seqkv demo`: a real model with the dense cache and with this one, measured here, side by side."""

from __future__ import annotations

import argparse
import os
import platform
import sys

from .options import add_count, add_option_argument, add_output_arguments, check_plot, chosen_options, several, show

QUALITY_CONTEXT = 1024  # tokens before the first scored one


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="measure memory, speed and quality on SmolLM2-135M-Instruct",
        description="Generate with the dense cache and with seqkv, each in a process of its own, and compare.",
    )
    add_count(parser, "--context", 4096, "tokens of the prompt")
    add_count(parser, "--new-tokens", 64, "tokens to generate", kind=several)
    add_count(parser, "--held-out", 2000, "tokens to score", kind=several)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights (float32)")
    add_option_argument(parser)
    add_output_arguments(parser, "demo.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table on stderr, and the rest as asked.

    Raises:
        ConfigError: An option or a length cannot be.
        SeqKVError: The model cannot be had, or a run failed.
    """
    from ..eval import report
    from ..eval.extras import require

    options = chosen_options(args)
    require("psutil")
    check_plot(args.plot)
    result = _compare(args, options)
    show(args, report.table(result), result)
    if args.plot:
        report.plot(result, args.plot)
    return 0


def _compare(args: argparse.Namespace, options: dict) -> dict:
    from ..eval import environment
    from ..eval.measure import Run, measure_in_process

    runs = {}
    for cache in ("dynamic", "seqkv"):
        print(f"{cache}: load, warm up, generate", file=sys.stderr)
        runs[cache] = measure_in_process(Run(cache, options, args.context, args.new_tokens, args.dtype))
    print("quality, through both caches", file=sys.stderr)
    quality = _quality(args, options)
    pairs = zip(runs["dynamic"]["tokens"], runs["seqkv"]["tokens"], strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), args.new_tokens)
    return {
        "command": args.command,
        "machine": {"cpu": environment.cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **environment.versions()},
        "runs": runs,
        "same_tokens": same,
        "bytes_ratio": runs["dynamic"]["cache"]["bytes"] / runs["seqkv"]["cache"]["bytes"],
        "quality": {"context": QUALITY_CONTEXT, **quality},
    }


def _quality(args: argparse.Namespace, options: dict) -> dict:
    """Perplexity and distance from dense, over `--held-out` tokens after `QUALITY_CONTEXT`."""
    import torch
    from tqdm.auto import tqdm
    from transformers import DynamicCache

    from ..eval import passages, smollm2
    from ..eval.perplexity import lockstep, pooled
    from ..integration.cache import SeqKVCache

    model, tokenizer, _ = smollm2.load(getattr(torch, args.dtype))
    ids = passages.held_out(tokenizer, QUALITY_CONTEXT + args.held_out)
    caches = {"seqkv": SeqKVCache(config=model.config, **options)}
    with tqdm(total=2 * (ids.shape[1] - 1), unit="token", leave=False) as bar:
        scores = lockstep(model, ids, DynamicCache(config=model.config), caches, QUALITY_CONTEXT, bar.update)
    return pooled([scores["seqkv"]]).to_dict()
