"""One decode step of one layer's attention on a GPU: the kernels over codes against torch over a dense cache.

As `bench_kernels`, for a batch of rows and a GPU's clock. Every way is timed twice: `device`, the GPU's own time, as a
CUDA graph of calls on all copies is replayed; and `eager`, as a model without graphs calls it, where the time in which
Python prepares a launch counts as soon as it is longer than the GPU's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from ..codec.page import PageCodec
from ..config import SeqKVConfig
from ..errors import ConfigError
from ..kernels import reference
from ..kernels.interface import Scoring, select_backend
from .bench_kernels import copy_count, make_view, page_count, verify
from .bench_shapes import Rate, Shape, page_codec
from .bench_timing import interleaved, spread, with_speedup

BASELINE = "sdpa"
WARM = 3  # calls of every way before it is captured


def on_device(x, device: torch.device):
    """Tensors, codecs and dataclasses of them, on a device; all else as it is."""
    if isinstance(x, torch.Tensor | PageCodec):
        return x.to(device)
    if not dataclasses.is_dataclass(x):
        return x
    return dataclasses.replace(x, **{f.name: on_device(getattr(x, f.name), device) for f in dataclasses.fields(x)})


def gpu(name: str) -> dict:
    """What times depend on, of a CUDA device.

    Raises:
        ConfigError: There is no such device.
    """
    device = torch.device(name)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(f"no CUDA device {name!r} here; leave --device out to measure the CPU")
    found = torch.cuda.get_device_properties(device)
    return {"name": found.name, "memory": found.total_memory, "multiprocessors": found.multi_processor_count,
            "cache": found.L2_cache_size, "torch_cuda": torch.version.cuda}  # fmt: skip


def dense_routes(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, copies: int) -> dict[str, Callable]:
    """Torch's ways over `query [B, Hq, 1, D]` and `keys`, `values [B, H, T, D]`, all of one dtype."""
    batch, heads, _, dim = keys.shape
    dense = [(keys.clone(), values.clone()) for _ in range(copies)]
    grouped = query.reshape(batch * heads, -1, dim)
    last = [x[:, :, -1:].clone() for x in (keys, values)]

    def bmm(i):
        k, v = (x.flatten(0, 1) for x in dense[i])
        probs = torch.softmax(torch.bmm(grouped, k.transpose(1, 2)).float() * dim**-0.5, -1).to(query)
        return torch.bmm(probs, v).reshape(batch, -1, dim)

    def sdpa(i):
        return scaled_dot_product_attention(query, *dense[i], enable_gqa=True)[:, :, 0]

    def grown(i):  # as `DynamicCache` makes room for a token
        k, v = (torch.cat([x[:, :, :-1], new], 2) for x, new in zip(dense[i], last, strict=True))
        return scaled_dot_product_attention(query, k, v, enable_gqa=True)[:, :, 0]

    return {"sdpa": sdpa, "bmm": bmm, "DynamicCache": grown}


def captured(call: Callable[[int], object], copies: int) -> Callable[[int], None]:
    """Replays a CUDA graph of `call(0)` to `call(copies - 1)`, and waits for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(WARM):
            call(i % copies)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(copies):
            call(i)

    def replay(_):
        graph.replay()
        torch.cuda.synchronize()

    return replay


def called(call: Callable[[int], object], copies: int) -> Callable[[int], None]:
    """Calls `call(0)` to `call(copies - 1)`, and waits for them."""

    def burst(_):
        for i in range(copies):
            call(i)
        torch.cuda.synchronize()

    return burst


@torch.no_grad()
def bench(
    shapes: list[Shape],
    tokens: list[int],
    batches: list[int],
    rates: list[Rate],
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 1.0,
    progress: bool = True,
) -> list[dict]:
    """Check and time all ways for every shape, length and batch.

    Args:
        dtype: Of queries, dense caches and the dense windows beside pages.
        seconds: For the calls of a row, each clock.

    Returns:
        A dict a row: by way `device` and `eager` seconds with `speedup`, the baseline's median over its own, and
        `bytes` of keys and values; `gigabytes_per_second` those over the device's median.

    Raises:
        BackendError: The kernels disagree with the reference.
        ConfigError: No such GPU, or a length that holds no page or does not fit.
    """
    cache = gpu(device)["cache"]
    for count in tokens:
        page_count(count)
    rows, where = [], torch.device(device)
    work = list(itertools.product(shapes, tokens, batches))
    with torch.random.fork_rng(devices=[where]), torch.cuda.device(where):
        for shape, count, batch in tqdm(work, unit="row", disable=not progress, leave=False):
            torch.manual_seed(0)
            rows.append(_row(shape, count, batch, rates, where, dtype, seconds, cache))
            torch.cuda.empty_cache()
    return rows


def _row(shape, tokens, batch, rates, device, dtype, seconds, cache):
    query = torch.randn(batch, shape.query_heads, 1, shape.dim, dtype=dtype, device=device)
    keys, values = (torch.randn(batch, shape.heads, tokens, shape.dim, dtype=dtype, device=device) for _ in "kv")
    dense = 2 * keys.nbytes
    free = torch.cuda.mem_get_info(device)[0]
    copies = copy_count(dense, 3 * dense, cache, False, memory=free // 2)
    routes, errors = dense_routes(query, keys, values, copies), {}
    sizes = dict.fromkeys(routes, dense)
    scoring = Scoring(shape.dim**-0.5)
    for rate in rates:
        codec = page_codec(shape, rate, SeqKVConfig().page_size)
        view = on_device(make_view(codec, tokens, rate.center, dtype, batch), device)
        backend = select_backend("auto", view.codec, device)
        exact = query.float()  # the output is not rounded before it is compared
        what = f"{shape.name}, batch {batch}, {tokens} tokens, {rate.name} bits"
        expected = reference.attend_codes(exact, view, None, scoring)
        out = backend.attend_codes(exact, view, None, scoring)
        errors[rate.name] = verify(what, out, expected, backend.tolerance)
        views = [dataclasses.replace(view, pages=view.pages.clone()) for _ in range(copies)]
        windows = [x for run in (view.sinks, view.recent) for x in (run.k, run.v)]
        sizes[rate.name] = view.pages.nbytes + sum(x.nbytes for x in windows)
        routes[rate.name] = _coded(backend.attend_codes, query, views, scoring)
    times = {}
    for clock, timed in (("device", captured), ("eager", called)):
        raw = interleaved({name: timed(call, copies) for name, call in routes.items()}, 1, seconds)
        times[clock] = with_speedup({name: spread([t / copies for t in of]) for name, of in raw.items()}, BASELINE)
    found = {
        name: {clock: times[clock][name] for clock in times}
        | {"bytes": sizes[name], "gigabytes_per_second": sizes[name] / times["device"][name]["median"] / 1e9}
        | ({"error": errors[name]} if name in errors else {})
        for name in routes
    }
    return {"shape": shape.name, "tokens": tokens, "batch": batch, "copies": copies, "routes": found}


def _coded(attend, query, views, scoring):
    return lambda i: attend(query, views[i], None, scoring)
