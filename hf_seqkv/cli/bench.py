"""`seqkv bench WHAT`: what the cache costs and gains, piece by piece; each piece's work is a module of `eval/`.

A piece is a function that adds its parser, listed in `PIECES`, and one that runs.
"""

from __future__ import annotations

import argparse
import os
import sys

from ..config import BITS
from ..errors import ConfigError
from . import bench_ablation, bench_codec, bench_exact, bench_quality, bench_replay, bench_roofline, bench_store
from .options import (
    add_count,
    add_option_argument,
    add_output_arguments,
    chosen_options,
    number,
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


# -- kernels: a layer's attention on this processor -------------------------------------------------------------------


def _add_kernels(pieces) -> None:
    parser = pieces.add_parser(
        "kernels",
        help="a layer's attention here: the kernel over codes against torch over a dense cache",
        description="Time one decode step of one layer's attention on this machine, checked against the reference.",
    )
    _list(parser, "--shape", _shape, "32/8x128 9/3x64", "HQ/HKxD", "query heads, KV heads, components")
    _list(parser, "--tokens", positive, "512 1024 4096 16384 65536", "N", "tokens in the cache")
    rates = "bits of keys and values; c codes the keys' constant part apart, as the cache does by default"
    _list(parser, "--bits", _rate, "4 2 5/4c", "K[/V][c]", rates)
    parser.add_argument("--center", action="store_true", help="c for every rate")
    whole = {"nargs": "+", "type": positive, "metavar": "N"}
    parser.add_argument("--threads", help="threads, on the processor (1 and all)", **whole)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of queries and dense windows (bfloat16)")
    parser.add_argument("--seconds", type=number, default=2.0, metavar="S", help="for the calls of a row (2)")
    parser.add_argument("--warm", action="store_true", help="one cache for all calls, from the processor's caches")
    parser.add_argument("--device", metavar="CUDA", help="a GPU, such as cuda; without it the processor")
    parser.add_argument("--batch", help="sequences, on a GPU (1 8 32)", **whole)
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


def _rate(text: str) -> tuple[float, float, bool]:
    keys, slash, values = text.removesuffix("c").partition("/")
    try:
        found = [float(bits) for bits in (keys, values if slash else keys)]
    except ValueError:
        found = []
    if not found or any(bits not in BITS and not (2 <= bits <= 5 and bits * 4 % 1 == 0) for bits in found):
        widths = ", ".join(map(str, BITS))
        raise argparse.ArgumentTypeError(
            f"{text!r} is not bits of {widths}, or quarters from 2 to 5, such as 4, 5/4, 5/4c or 3.5/2.5"
        )
    return *found, text.endswith("c")


def _run_kernels(args: argparse.Namespace) -> int:
    """Check and time, print the table on stderr, and JSON as asked.

    Raises:
        BackendError: The kernel disagrees with the reference.
        ConfigError: A length that holds no page or does not fit.
    """
    import torch

    from ..eval import bench_kernels, bench_report, bench_shapes, bench_timing

    if args.device:
        return _run_cuda_kernels(args)
    if args.batch:
        raise ConfigError("--batch is for a GPU; give --device, or leave it out")
    print("the first time on a machine the kernel is compiled, about 30 s", file=sys.stderr)
    shapes = [bench_shapes.Shape(*shape) for shape in args.shape]
    rates = _kernel_rates(args)
    machine, backend = bench_timing.machine(), bench_kernels.chosen_backend()
    dtype = getattr(torch, args.dtype)
    threads = args.threads or sorted({1, _cores()})
    rows = bench_kernels.bench(shapes, args.tokens, rates, threads, dtype, args.seconds, args.warm)
    result = {"command": args.command, "machine": machine, "backend": backend, "dtype": args.dtype, "rows": rows}
    result |= {"seconds": args.seconds, "warm": args.warm, "baseline": bench_kernels.BASELINE}
    show(args, bench_report.kernels(result), result)
    return 0


def _kernel_rates(args: argparse.Namespace) -> list:
    """Without repetition: "4" and "4c" are one rate where all are centred."""
    from ..eval import bench_shapes

    return list(dict.fromkeys(bench_shapes.Rate(k, v, center or args.center) for k, v, center in args.bits))


def _run_cuda_kernels(args: argparse.Namespace) -> int:
    """As `_run_kernels`, on a GPU.

    Raises:
        BackendError, ConfigError: As there.
    """
    import torch

    from ..eval import bench_cuda, bench_kernels, bench_report, bench_shapes, bench_timing

    if args.threads or args.warm:
        raise ConfigError("--threads and --warm are for the processor; leave them out, or --device")
    gpu, shapes = bench_cuda.gpu(args.device), [bench_shapes.Shape(*shape) for shape in args.shape]
    measured = args.device, getattr(torch, args.dtype), args.seconds
    rows = bench_cuda.bench(shapes, args.tokens, args.batch or [1, 8, 32], _kernel_rates(args), *measured)
    result = {"command": args.command, "machine": bench_timing.machine(), "gpu": gpu}
    result |= {"backend": bench_kernels.chosen_backend(device=args.device)}
    result |= {"dtype": args.dtype, "rows": rows, "seconds": args.seconds, "baseline": bench_cuda.BASELINE}
    show(args, bench_report.cuda_kernels(result), result)
    return 0


# -- decode: a model's steps -----------------------------------------------------------------------------------------


def _add_decode(pieces) -> None:
    parser = pieces.add_parser(
        "decode",
        help="whole decode steps of a model (SmolLM2-135M-Instruct) with each cache",
        description="Time prefill and single decode steps with transformers' caches and this one, in turn.",
    )
    _list(parser, "--context", positive, "1024 8192", "N", "tokens of the prompt")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights (both)")
    # as many as a default page has tokens: each cache of ours then makes a page exactly once
    add_count(parser, "--new-tokens", 64, "steps of each cache", kind=several)
    caches = ("dynamic", "static", "compiled", "seqkv-eager", "seqkv")
    parser.add_argument("--caches", nargs="+", choices=caches, help="which (dynamic static seqkv; on a GPU all)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads (torch's default)")
    parser.add_argument("--device", default="cpu", help="of the model, such as cuda (cpu)")
    add_count(parser, "--batch", 1, "sequences, all the same")
    named = "random weights of this shape: llama-3-8b, ..., a config.json or a Hub repository's (SmolLM2's own weights)"
    parser.add_argument("--model-config", metavar="PATH_OR_NAME", help=named)
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

    from ..eval import bench_cuda, bench_decode, bench_kernels, bench_report, bench_timing

    print("the first time on a machine the kernel is compiled, about 30 s", file=sys.stderr)
    gpu = None if args.device == "cpu" else bench_cuda.gpu(args.device)
    backend = bench_kernels.chosen_backend(options.get("backend", "auto"), args.device)
    machine = bench_timing.machine()
    before, runs = torch.get_num_threads(), []
    threads = args.threads or before
    try:
        for dtype in dict.fromkeys(args.dtype):
            model, tokens, description = _decoding(args, getattr(torch, dtype))
            torch.set_num_threads(threads)
            for context in args.context:
                ids = tokens(context).to(args.device).repeat(args.batch, 1)
                caches = tuple(dict.fromkeys(args.caches or ()))
                runs.append({"dtype": dtype, **bench_decode.bench(model, ids, args.new_tokens, caches, options)})
    finally:
        torch.set_num_threads(before)
    result = {"command": args.command, "machine": machine, "gpu": gpu, "backend": backend, "model": description}
    result |= {"threads": threads, "options": options, "runs": runs}
    show(args, bench_report.decode(result), result)
    return 0


def _decoding(args: argparse.Namespace, dtype):
    """A model, what makes a prompt `[1, T]` for it, and what it is."""
    import torch

    from ..eval import bench_decode, smollm2

    if args.model_config:
        model = bench_decode.random_model(args.model_config, dtype, args.device)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        return model, lambda length: torch.arange(length)[None] % vocabulary, f"{args.model_config}, random weights"
    model, tokenizer, description = smollm2.load(dtype)
    return model.to(args.device), lambda length: bench_decode.prompt(tokenizer, length), description


PIECES = (
    bench_roofline.add,
    _add_kernels,
    _add_decode,
    bench_ablation.add,
    bench_codec.add,
    bench_exact.add,
    bench_quality.add,
    bench_replay.add,
    bench_store.add,
)
