"""`seqkv bench ablation`: what each ingredient of the sequence codec is worth."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .bench_quality import TEXTS
from .options import add_model_arguments, load_model, positive, read_texts


def add(pieces) -> None:
    parser = pieces.add_parser(
        "ablation",
        help="the sequence codec without each of its ingredients",
        description="Fit the sequence codec with one ingredient left out at a time; compare rates at equal quality.",
    )
    parser.add_argument("--model", default="demo", help="directory or Hub repository (default: the demo's model)")
    add_model_arguments(parser)
    parser.add_argument("--fit", nargs="+", type=Path, required=True, metavar="FILE", help="UTF-8 texts to fit to")
    judged = f"UTF-8 texts to judge by (default: the package's {' and '.join(TEXTS)})"
    parser.add_argument("--texts", nargs="+", type=Path, metavar="FILE", help=judged)
    parser.add_argument("--tokens", type=positive, default=32_768, metavar="N", help="to fit to (32768)")
    parser.add_argument("--windows", type=positive, default=1, metavar="N", help="windows a text to judge by (1)")
    parser.add_argument("--window", type=positive, default=2048, metavar="N", help="tokens a window (2048)")
    parser.add_argument("--seed", type=int, default=0, help="which windows are drawn (0)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, the last line of stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Measure, print the table on stderr, and JSON if asked.

    Raises:
        ConfigError: Texts too short, or judged by what was fitted to.
        SeqKVError: The model cannot be had.
    """
    from ..eval import ablation, bench_timing, passages, quality

    fitted = list(read_texts(args.fit).values())
    judged = read_texts(args.texts) if args.texts else {name: passages.read(name) for name in TEXTS}
    model, tokenizer, description = load_model(args.model, args.gguf_file, args.dtype)
    plan = quality.Plan(args.windows, args.window)
    found = ablation.measure(model, tokenizer, fitted, judged, args.tokens, args.seed, plan)
    print(ablation.table(found), file=sys.stderr)
    if args.json:
        machine = bench_timing.machine()
        print(json.dumps({"command": args.command, "machine": machine, "model": description, "variants": found}))
    return 0
