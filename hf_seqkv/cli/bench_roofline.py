"""`seqkv bench roofline`: what a GPU could do at best."""

from __future__ import annotations

import argparse

from ..config import BITS, DATA_FREE
from ..errors import ConfigError
from .options import add_output_arguments, check_plot, number, positive, show

MEAN_BITS = (*BITS, *(n / 4 for n in range(8, 20) if n % 4))


def add(pieces) -> None:
    parser = pieces.add_parser(
        "roofline",
        help="upper bounds of a decode step on a GPU, from its data sheet",
        description="Bytes, instructions and the bound of one decode step on a GPU that need not be here.",
    )
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="h100 (default), a100-80, rtx4090, ...")
    parser.add_argument(
        "--model-config",
        default="llama-3-8b",
        metavar="PATH_OR_NAME",
        help="config.json, its directory, a Hub repository, or llama-3-8b (default), smollm2-135m, ...",
    )
    whole = {"nargs": "+", "type": positive, "metavar": "N"}
    parser.add_argument("--context", default=[8192, 32768, 131072], help="tokens (8192 32768 131072)", **whole)
    parser.add_argument("--batch", default=[1, 8, 32], help="sequences (1 8 32)", **whole)
    for side in ("key", "value"):
        help_text = f"of a {side}'s codes ({DATA_FREE[f'{side}_bits']}); quarters, too, as calibrations mix them"
        parser.add_argument(f"--{side}-bits", type=float, choices=MEAN_BITS, metavar="N", help=help_text)
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, metavar="N", help="keys' and values', a rate each")
    parser.add_argument("--weight-bits", type=number, default=16, metavar="N", help="of a parameter (16)")
    parser.add_argument("--launch-us", type=number, default=4.0, metavar="US", help="of one kernel launch (4)")
    parser.add_argument(
        "--instructions",
        nargs="+",
        type=_count,
        default=[],
        metavar="BITS=N",
        help="instructions a code of this width, in place of the recorded counts",
    )
    add_output_arguments(parser, "roofline.png")
    parser.set_defaults(run=_run)


def _count(text: str) -> tuple[int, float]:
    bits, _, count = text.partition("=")
    if not (bits.isdecimal() and count):
        raise argparse.ArgumentTypeError(f"{text!r} is not BITS=N, such as 4=2.73")
    return int(bits), number(count)


def _run(args: argparse.Namespace) -> int:
    """Compute, print the table on stderr, and the rest as asked.

    Raises:
        ConfigError: No such GPU, or options that contradict each other.
        SeqKVError: The model's config cannot be had or read.
    """
    from dataclasses import asdict

    from ..eval import roofline, roofline_model, roofline_report

    rates = [roofline.Rate(*bits) for bits in _rates(args)]
    gpu = roofline.gpu(args.gpu)
    check_plot(args.plot)
    model = roofline_model.load(args.model_config)
    given = roofline.Assumptions(
        weight_bits=args.weight_bits,
        launch_seconds=args.launch_us * 1e-6,
        instructions=roofline.INSTRUCTIONS | roofline.ESTIMATES | dict(args.instructions),
    )
    rows = roofline.roofline(gpu, model, args.context, args.batch, rates, given)
    result = {
        "command": args.command,
        "gpu": asdict(gpu),
        "model": asdict(model),
        "assumptions": asdict(given) | {"said": roofline_report.assumptions(gpu, model, rows, given)},
        "rows": [row.to_dict() | {"verdict": roofline_report.verdict(row)} for row in rows],
    }
    show(args, roofline_report.table(gpu, model, rows, given), result)
    if args.plot:
        roofline_report.plot(gpu, model, rows, args.plot)
    return 0


def _rates(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Bits of keys and of values, a pair a rate."""
    if args.bits is None:
        return [(args.key_bits or DATA_FREE["key_bits"], args.value_bits or DATA_FREE["value_bits"])]
    if args.key_bits or args.value_bits:
        raise ConfigError("--bits gives keys and values the same; leave it out, or --key-bits and --value-bits")
    return [(bits, bits) for bits in args.bits]
