"""`seqkv bench codec`: how fast the sequence codec is, on real pages."""

from __future__ import annotations

import argparse

from .options import add_count, add_model_option, add_output_arguments, load_model, positive, show, step


def add(pieces) -> None:
    parser = pieces.add_parser(
        "codec",
        help="speed and rate of a calibration's sequence codec",
        description="Encode and decode pages of a real text, all layers, and time it.",
    )
    parser.add_argument("--calibration", required=True, metavar="DIR_OR_REPO", help="with a sequence codec")
    add_model_option(parser)
    parser.add_argument("--profiles", nargs="+", default=["full", "light"], help="(default: full light)")
    parser.add_argument("--steps", nargs="+", type=step, default=[0], metavar="N", help="or names of presets (0)")
    add_count(parser, "--pages", 32, "coded at once")
    add_count(parser, "--tokens", 1028, "of the text that is run")
    parser.add_argument("--threads", type=positive, metavar="N", help="(default: torch's)")
    parser.add_argument("--seconds", type=positive, default=10, metavar="S", help="for each setting (10)")
    add_output_arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Measure, print the table on stderr, and JSON if asked.

    Raises:
        ConfigError: The calibration has no such codec, or the text is too short.
        SeqKVError: The model or the calibration cannot be had.
    """
    import torch

    from ..calibration.artifact import SeqKVCalibration
    from ..eval import bench_codec, bench_timing, passages

    if args.threads:
        torch.set_num_threads(args.threads)
    calibration = SeqKVCalibration.from_pretrained(args.calibration)
    model, tokenizer, description = load_model(args.model, args.gguf_file, args.dtype)
    ids = passages.held_out(tokenizer, args.tokens)[0]
    settings = [(profile, step) for profile in args.profiles for step in args.steps]
    rows = bench_codec.measure(model, ids, calibration, settings, args.pages, args.seconds)
    result = {"command": args.command, "machine": bench_timing.machine(), "threads": torch.get_num_threads()}
    result |= {"model": description, "pages": args.pages, "rows": rows}
    show(args, bench_codec.table(result), result)
    return 0
