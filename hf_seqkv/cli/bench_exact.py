"""`seqkv bench exact`: how small hot pages get without loss."""

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
    read_texts,
    show,
)

FITTED, MEASURED = "jargon_file", "king_james"  # texts of the package
WINDOW = 1028  # tokens of a window that tables are fitted to


def add(pieces) -> None:
    parser = pieces.add_parser(
        "exact",
        help="rate and speed of the lossless coding of hot pages",
        description="Run a text through a cache, code its pages without loss, check them, and time it.",
    )
    parser.add_argument("--calibration", required=True, metavar="DIR_OR_REPO", help="with a sequence codec")
    add_model_option(parser)
    add_option_argument(parser)
    parser.add_argument("--texts", nargs="+", type=Path, metavar="FILE", help=f"(default: {MEASURED} of the package)")
    add_count(parser, "--tokens", 1028, "of each text")
    add_count(parser, "--fit-tokens", 8224, f"of {FITTED}, which tables are fitted to")
    parser.add_argument("--gains", action="store_true", help="what each predictor gains, too: seven times as long")
    parser.add_argument("--threads", type=positive, metavar="N", help="(default: torch's)")
    parser.add_argument("--seconds", type=positive, default=10, metavar="S", help="of timing (10)")
    add_output_arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Measure, print the table on stderr, and JSON if asked.

    Raises:
        ConfigError: A text is too short, an option invalid, or the calibration does not predict.
        SeqKVError: The model, a text or the calibration cannot be had.
    """
    import torch

    from ..calibration.artifact import SeqKVCalibration
    from ..eval import bench_exact, bench_timing, passages
    from ..integration.gather import token_windows

    if args.threads:
        torch.set_num_threads(args.threads)
    options = chosen_options(args)
    texts = read_texts(args.texts or []) or {MEASURED: passages.read(MEASURED)}
    calibration = SeqKVCalibration.from_pretrained(args.calibration)
    model, tokenizer, description = load_model(args.model, args.gguf_file, args.dtype)
    ids = [token_windows(tokenizer, [text], args.tokens, args.tokens, 0)[0] for text in texts.values()]
    window = min(WINDOW, args.fit_tokens)
    count = args.fit_tokens // window * window
    windows = token_windows(tokenizer, [passages.read(FITTED)], count, window, 0)
    found = bench_exact.measure(model, ids, windows, calibration, options, args.gains, args.seconds)
    result = {"command": args.command, "machine": bench_timing.machine(), "threads": torch.get_num_threads()}
    result |= {"model": description, "options": options, "texts": list(texts), "fit_tokens": windows.numel(), **found}
    show(args, bench_exact.table(result), result)
    return 0
