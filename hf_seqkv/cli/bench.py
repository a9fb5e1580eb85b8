"""`seqkv bench WHAT`: what the cache costs and gains, piece by piece; each piece's work is a module of `eval/`.

A piece is a function that adds its parser, listed in `PIECES`, and one that runs.
"""

from __future__ import annotations

import argparse
import os
import sys

from ..config import BITS, DATA_FREE
from ..errors import ConfigError
from . import bench_ablation, bench_codec, bench_exact, bench_quality, bench_replay, bench_store
from .options import (
    add_count,
    add_option_argument,
    add_output_arguments,
    check_plot,
    chosen_options,
    positive,
    several,
    show,
)

DTYPES = ("float32", "bfloat16")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="bounds and timings of a decode step's pieces; quality against dense",
        description="What the cache costs and gains, piece by piece.",
    )
    pieces = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    for add in PIECES:
        add(pieces)


def _number(text: str) -> float:
    """Finite and not negative."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


# -- roofline: what a GPU could do at best -----------------------------------------------------------------------

MEAN_BITS = (*BITS, *(n / 4 for n in range(8, 20) if n % 4))


def _add_roofline(pieces) -> None:
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
    parser.add_argument("--weight-bits", type=_number, default=16, metavar="N", help="of a parameter (16)")
    parser.add_argument("--launch-us", type=_number, default=4.0, metavar="US", help="of one kernel launch (4)")
    parser.add_argument(
        "--instructions",
        nargs="+",
        type=_count,
        default=[],
        metavar="BITS=N",
        help="instructions a code of this width, in place of the recorded counts",
    )
    add_output_arguments(parser, "roofline.png")
    parser.set_defaults(run=_run_roofline)


def _count(text: str) -> tuple[int, float]:
    bits, _, count = text.partition("=")
    if not (bits.isdecimal() and count):
        raise argparse.ArgumentTypeError(f"{text!r} is not BITS=N, such as 4=2.73")
    return int(bits), _number(count)


def _run_roofline(args: argparse.Namespace) -> int:
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


# -- kernels: a layer's attention on this processor -------------------------------------------------------------------


def _add_kernels(pieces) -> None:
    parser = pieces.add_parser(
        "kernels",
        help="a layer's attention here: the kernel over codes against torch over a dense cache",
        description="Time one decode step of one layer's attention on this processor, checked against the reference.",
    )
    _list(parser, "--shape", _shape, "32/8x128 9/3x64", "HQ/HKxD", "query heads, KV heads, components")
    _list(parser, "--tokens", positive, "512 1024 4096 16384 65536", "N", "tokens in the cache")
    rates = "bits of keys and values; c codes the keys' constant part apart, as the cache does by default"
    _list(parser, "--bits", _rate, "4 2 5/4c", "K[/V][c]", rates)
    parser.add_argument("--center", action="store_true", help="c for every rate")
    _list(parser, "--threads", positive, f"1 {_cores()}" if _cores() > 1 else "1", "N", "threads")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of queries and dense windows (bfloat16)")
    parser.add_argument("--seconds", type=_number, default=2.0, metavar="S", help="for the calls of a row (2)")
    parser.add_argument("--warm", action="store_true", help="one cache for all calls, from the processor's caches")
    add_output_arguments(parser)
    parser.set_defaults(run=_run_kernels)


def _list(parser, name: str, kind, default: str, metavar: str, help_text: str) -> None:
    """An option of one or more values."""
    values = [kind(text) for text in default.split()]
    parser.add_argument(name, nargs="+", type=kind, default=values, metavar=metavar, help=f"{help_text} ({default})")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shape(text: str) -> tuple[int, int, int]:
    heads, _, dim = text.partition("x")
    numbers = [*heads.split("/"), dim]
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers) or int(numbers[0]) % int(numbers[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not HQ/HKxD with HQ a multiple of HK, such as 32/8x128")
    return int(numbers[0]), int(numbers[1]), int(dim)


def _rate(text: str) -> tuple[int, int, bool]:
    keys, slash, values = text.removesuffix("c").partition("/")
    values = values if slash else keys
    if not (keys.isdecimal() and values.isdecimal() and {int(keys), int(values)} <= set(BITS)):
        widths = ", ".join(map(str, BITS))
        raise argparse.ArgumentTypeError(f"{text!r} is not bits of {widths} such as 4, 5/4 or 5/4c")
    return int(keys), int(values), text.endswith("c")


def _run_kernels(args: argparse.Namespace) -> int:
    """Check and time, print the table on stderr, and JSON as asked.

    Raises:
        BackendError: The kernel disagrees with the reference.
        ConfigError: A length that holds no page or does not fit.
    """
    import torch

    from ..eval import bench_kernels, bench_report, bench_timing

    print("the first time on a machine the kernel is compiled, about 40 s", file=sys.stderr)
    shapes = [bench_kernels.Shape(*shape) for shape in args.shape]
    # "4" and "4c" are one rate where all are centred
    rates = list(dict.fromkeys(bench_kernels.Rate(k, v, center or args.center) for k, v, center in args.bits))
    machine, backend = bench_timing.machine(), bench_kernels.chosen_backend()
    dtype = getattr(torch, args.dtype)
    rows = bench_kernels.bench(shapes, args.tokens, rates, args.threads, dtype, args.seconds, args.warm)
    result = {"command": args.command, "machine": machine, "backend": backend, "dtype": args.dtype, "rows": rows}
    result |= {"seconds": args.seconds, "warm": args.warm, "baseline": bench_kernels.BASELINE}
    show(args, bench_report.kernels(result), result)
    return 0


# -- decode: a small model's steps -----------------------------------------------------------------------------------


def _add_decode(pieces) -> None:
    parser = pieces.add_parser(
        "decode",
        help="whole decode steps of SmolLM2-135M-Instruct with each cache",
        description="Time prefill and single decode steps with transformers' caches and this one, in turn.",
    )
    _list(parser, "--context", positive, "1024 8192", "N", "tokens of the prompt")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights (both)")
    # as many as a default page has tokens: each cache of ours then makes a page exactly once
    add_count(parser, "--new-tokens", 64, "steps of each cache", kind=several)
    caches = ("dynamic", "static", "seqkv")
    parser.add_argument("--caches", nargs="+", choices=caches, default=caches, help="which (dynamic static seqkv)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads (torch's default)")
    add_option_argument(parser)
    add_output_arguments(parser)
    parser.set_defaults(run=_run_decode)


def _run_decode(args: argparse.Namespace) -> int:
    """Measure, print the table on stderr, and JSON as asked.

    Raises:
        ConfigError: An option or a length cannot be.
        SeqKVError: The model cannot be had.
    """
    options = chosen_options(args)
    import torch

    from ..eval import bench_decode, bench_kernels, bench_report, bench_timing, smollm2

    print("the first time on a machine the kernel is compiled, about 40 s", file=sys.stderr)
    machine, backend = bench_timing.machine(), bench_kernels.chosen_backend(options.get("backend", "auto"))
    before, runs = torch.get_num_threads(), []
    threads = args.threads or before
    try:
        for dtype in dict.fromkeys(args.dtype):
            model, tokenizer, description = smollm2.load(getattr(torch, dtype))
            torch.set_num_threads(threads)
            for context in args.context:
                ids = bench_decode.prompt(tokenizer, context)
                caches = tuple(dict.fromkeys(args.caches))
                runs.append({"dtype": dtype, **bench_decode.bench(model, ids, args.new_tokens, caches, options)})
    finally:
        torch.set_num_threads(before)
    result = {"command": args.command, "machine": machine, "backend": backend, "model": description}
    result |= {"threads": threads, "options": options, "runs": runs}
    show(args, bench_report.decode(result), result)
    return 0


PIECES = (
    _add_roofline,
    _add_kernels,
    _add_decode,
    bench_ablation.add,
    bench_codec.add,
    bench_exact.add,
    bench_quality.add,
    bench_replay.add,
    bench_store.add,
)
