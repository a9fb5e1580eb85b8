"""`seqkv demo`: a real model with the dense cache and with this one, measured here, side by side."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys

from ..errors import ConfigError
from .options import add_option_argument, chosen_options

QUALITY_CONTEXT = 1024  # tokens before the first scored one


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="measure memory, speed and quality on SmolLM2-135M-Instruct",
        description="Generate with the dense cache and with seqkv, each in a process of its own, and compare.",
    )
    parser.add_argument("--context", type=_positive, default=4096, metavar="N", help="tokens of the prompt (4096)")
    parser.add_argument("--new-tokens", type=_several, default=64, metavar="N", help="tokens to generate (64)")
    parser.add_argument("--held-out", type=_several, default=2000, metavar="N", help="tokens to score (2000)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights (float32)")
    add_option_argument(parser)
    parser.add_argument("--plot", metavar="FILE", help="write a chart, such as demo.png")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, the last line of stdout")
    parser.set_defaults(run=run)


def _positive(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _several(text: str) -> int:
    """For counts of which a median or a standard error is taken."""
    return _positive(text, least=2)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table on stderr, and the rest as asked.

    Raises:
        ConfigError: An option or a length cannot be.
        SeqKVError: The model cannot be had, or a run failed.
    """
    from ..eval import report
    from ..eval.extras import require

    options = chosen_options(args)
    require("psutil", *(["matplotlib"] if args.plot else []))
    if args.plot and not os.path.isdir(os.path.dirname(os.path.abspath(args.plot))):
        raise ConfigError(f"--plot {args.plot}: there is no such directory; create it or choose another")
    result = _compare(args, options)
    print(report.table(result), file=sys.stderr)
    if args.plot:
        report.plot(result, args.plot)
    if args.json:
        print(json.dumps(result))
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
    from transformers import DynamicCache

    from ..eval import passages, smollm2
    from ..eval.perplexity import compare, teacher_forced_logits
    from ..integration.cache import SeqKVCache

    model, tokenizer, _ = smollm2.load(getattr(torch, args.dtype))
    ids = passages.held_out(tokenizer, QUALITY_CONTEXT + args.held_out)
    caches = {"dense": DynamicCache(config=model.config), "seqkv": SeqKVCache(config=model.config, **options)}
    dense, coded = (teacher_forced_logits(model, ids, cache, QUALITY_CONTEXT, label) for label, cache in caches.items())
    return compare(dense, coded, ids[0, QUALITY_CONTEXT:]).to_dict()
