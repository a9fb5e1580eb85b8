"""One decode step of one layer's attention: the kernel over codes against torch over a dense cache.

The baseline that counts is the fastest way we know in plain torch: two grouped matrix products over a preallocated
cache, `[HK, G, D] x [HK, D, T]` and back, in bf16, or in fp32 on processors that cannot multiply bf16. SDPA and
`DynamicCache` are timed because people use them.

In a model every layer has a cache of its own, so a call never finds its tokens in the processor's caches. Here, too,
every call takes the next of several equal copies, and the ways are timed in turn: what one reads drives out the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..codec.center import Center
from ..codec.page import QuantizedPageCodec
from ..config import SeqKVConfig
from ..errors import BackendError, ConfigError
from ..kernels import reference
from ..kernels.interface import DenseRun, LayerView, Scoring, select_backend
from .bench_shapes import Rate, Shape, page_codec
from .bench_timing import interleaved, last_level_cache, spread, with_speedup

BASELINE = "bmm bf16"
LAYERS = 30  # most copies
BEYOND = 4  # last-level caches that the dense copies fill together
MEMORY = 4e9  # bytes of all copies
ENCODED = 4  # distinct pages; the others repeat them


@dataclass(frozen=True)
class Route:
    """One way to attend: `call(i)` takes copy `i` and gives `[Hq, D]`; `size` bytes of keys and values are read."""

    call: Callable[[int], torch.Tensor]
    size: int


# -- the ways ----------------------------------------------------------------------------------------------------------


def chosen_backend(name: str = "auto", device: str = "cpu") -> str:
    """Which backend a name stands for on a device, and how the compiled kernel computes."""
    chosen = select_backend(name, page_codec(Shape(1, 1, 64), Rate(4, 4), 64), torch.device(device)).name
    if chosen != "cpu":
        return chosen
    from ..kernels import cpu

    return f"cpu ({cpu.path()})"


def page_count(tokens: int) -> int:
    """Pages of a cache with default windows.

    Raises:
        ConfigError: There is none.
    """
    config = SeqKVConfig()
    pages = (tokens - config.n_sink - config.residual_length) // config.page_size
    if pages < 1:
        least = config.n_sink + config.residual_length + config.page_size
        raise ConfigError(f"{tokens} tokens hold no page; ask for at least {least}")
    return pages


def make_view(
    codec: QuantizedPageCodec, tokens: int, center: bool, dtype: torch.dtype, batch: int = 1
) -> LayerView:
    """Cache of one layer: `tokens` random ones a row, in default windows of `dtype` and pages that repeat."""
    config, count = SeqKVConfig(), page_count(tokens)
    heads, size, dim = codec.heads, codec.page_size, codec.key_dim
    some = codec.encode(*(torch.randn(batch, min(ENCODED, count), heads, size, dim) for _ in "kv"))
    pages = some.repeat(1, -(-count // some.shape[1]), 1)[:, :count].contiguous()
    rest = tokens - config.n_sink - count * size
    sinks, recent = ([torch.randn(batch, heads, n, dim).to(dtype) for _ in "kv"] for n in (config.n_sink, rest))
    constant = _center(batch, heads, dim, size, config.n_sink + size * torch.arange(count)) if center else None
    zeros = [0] * batch
    runs = DenseRun(*sinks, zeros, zeros), DenseRun(*recent, [tokens - rest] * batch, zeros)
    return LayerView(codec, pages, [count] * batch, [config.n_sink] * batch, *runs, constant, tokens, 0)


def _center(batch: int, heads: int, dim: int, size: int, starts: torch.Tensor) -> Center:
    """A random constant under RoPE of base 10000, pages starting at positions `starts [N]`."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2) / (dim // 2))
    first, within = (n[:, None] * frequencies for n in (starts, torch.arange(size)))
    first, within = (torch.cat([x.cos(), x.sin()], -1) for x in (first, within))
    return Center(torch.randn(batch, heads, dim), first[None].expand(batch, -1, -1), within.half().float(), False)


def dense_routes(shape: Shape, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, copies: int) -> dict:
    """Torch's ways over dense keys and values.

    Args:
        query: `[1, Hq, 1, D]`, of the dtype that `DynamicCache` shall have.
        keys, values: `[1, H, T, D]` bf16.
    """
    heads, dim, scaling = shape.heads, shape.dim, shape.dim**-0.5
    dense = {torch.bfloat16: [(keys.clone(), values.clone()) for _ in range(copies)]}
    dense[torch.float32] = [(k.float(), v.float()) for k, v in dense[torch.bfloat16]]

    def bmm(dtype):
        grouped = (query.to(dtype) * scaling).reshape(heads, -1, dim)

        def call(i):
            k, v = (x[0] for x in dense[dtype][i])
            probs = torch.softmax(torch.bmm(grouped, k.transpose(1, 2)).float(), -1).to(dtype)
            return torch.bmm(probs, v).reshape(-1, dim)

        return call

    def sdpa(dtype):
        of = query.to(dtype)
        return lambda i: scaled_dot_product_attention(of, *dense[dtype][i], enable_gqa=True)[0, :, 0]

    cache = DynamicCache()
    last = [x[:, :, -1:].to(query) for x in (keys, values)]
    cache.update(*last, 0)
    layer = cache.layers[0]

    def dynamic(i):
        layer.keys, layer.values = (x[:, :, :-1] for x in dense[query.dtype][i])  # frees the last call's, as a step
        k, v = cache.update(*last, 0)
        return scaled_dot_product_attention(query, k, v, enable_gqa=True)[0, :, 0]

    size = 2 * keys.nbytes
    return {
        BASELINE: Route(bmm(torch.bfloat16), size),
        "bmm fp32": Route(bmm(torch.float32), 2 * size),
        "sdpa bf16": Route(sdpa(torch.bfloat16), size),
        "sdpa fp32": Route(sdpa(torch.float32), 2 * size),
        "DynamicCache": Route(dynamic, size * query.element_size() // 2),
    }


def coded_route(view: LayerView, query: torch.Tensor, attend, copies: int) -> Route:
    """The kernel over copies of a view."""
    scoring = Scoring(query.shape[-1] ** -0.5)
    views = [_copy(view) for _ in range(copies)]
    dense = [x for run in (view.sinks, view.recent) for x in (run.k, run.v)]
    size = sum(x.nbytes for x in (view.pages, *dense))
    return Route(lambda i: attend(query, views[i], None, scoring)[0, 0], size)


def _copy(view: LayerView) -> LayerView:
    runs = (DenseRun(run.k.clone(), run.v.clone(), run.slots, run.begin) for run in (view.sinks, view.recent))
    return LayerView(view.codec, view.pages.clone(), view.counts, view.page_slots, *runs, view.center, view.length, 0)


# -- the measurement ---------------------------------------------------------------------------------------------------


def verify(name: str, out: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """Largest difference, as a part of the largest output.

    Raises:
        BackendError: It exceeds `tolerance`, what the backend promises, or is not a number.
    """
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    if not error <= tolerance:
        raise BackendError(
            f"{name}: the kernel differs from the reference by {error:.1e} of the largest output; at most "
            f"{tolerance:.0e} is allowed, so its times mean nothing. Please report this with `seqkv inspect --env`"
        )
    return error


def copy_count(dense: int, all_bytes: int, cache: int, warm: bool, memory: float = MEMORY) -> int:
    """How many copies to turn over, for `dense` bytes of a bf16 copy and `all_bytes` of a copy for every way.

    Raises:
        ConfigError: Not even one fits `memory`.
    """
    if all_bytes > memory:
        raise ConfigError(f"a copy takes {all_bytes / 1e9:.1f} GB, more than {memory / 1e9:.0f}; ask for fewer tokens")
    return 1 if warm else max(1, min(LAYERS, BEYOND * cache // dense + 1, int(memory / all_bytes)))


@torch.no_grad()
def bench(
    shapes: list[Shape],
    tokens: list[int],
    rates: list[Rate],
    threads: list[int],
    dtype: torch.dtype = torch.bfloat16,
    seconds: float = 2.0,
    warm: bool = False,
    progress: bool = True,
) -> list[dict]:
    """Check and time all ways for every shape, length and number of threads.

    Args:
        dtype: Of queries, of the dense windows beside pages, and of `DynamicCache`.
        seconds: For the calls of one row; slow ways may take more for their least number of calls.
        warm: Whether one copy serves all calls.

    Returns:
        A dict a row: seconds of each way with `speedup`, the baseline's median over its own.

    Raises:
        BackendError: The kernel disagrees with the reference.
        ConfigError: A length that holds no page, or needs too much memory.
    """
    before, rows = torch.get_num_threads(), []
    for count in tokens:
        page_count(count)
    bar = tqdm(total=len(shapes) * len(tokens) * len(threads), unit="row", disable=not progress, leave=False)
    try:
        for shape, count in itertools.product(shapes, tokens):
            bar.set_description(f"{shape.name}, {count} tokens")
            torch.set_num_threads(max(threads))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for row in _rows(shape, count, rates, threads, dtype, seconds, warm):
                    rows.append(row)
                    bar.update()
    finally:
        bar.close()
        torch.set_num_threads(before)
    return rows


def _rows(shape, tokens, rates, threads, dtype, seconds, warm):
    cache, dense = last_level_cache(), 4 * tokens * shape.heads * shape.dim
    codecs = {rate: page_codec(shape, rate, SeqKVConfig().page_size) for rate in rates}
    coded = sum(codec.page_bytes * page_count(tokens) for codec in codecs.values())
    copies = copy_count(dense, 3 * dense + coded, cache, warm)
    query = torch.randn(1, shape.query_heads, 1, shape.dim).to(dtype)
    keys, values = (torch.randn(1, shape.heads, tokens, shape.dim, dtype=torch.bfloat16) for _ in "kv")
    routes = dense_routes(shape, query, keys, values, copies)
    views, expected, backends = {}, {}, {}
    exact = query.float(), Scoring(shape.dim**-0.5)  # the output is not rounded to bf16 before it is compared
    for rate, codec in codecs.items():
        view = make_view(codec, tokens, rate.center, dtype)
        backend = select_backend("auto", codec, query.device)
        routes[rate.name] = coded_route(view, query, backend.attend_codes, copies)
        views[rate.name], backends[rate.name] = view, backend
        expected[rate.name] = reference.attend_codes(exact[0], view, None, exact[1])
    for number in threads:
        torch.set_num_threads(number)
        errors = {}
        for name, view in views.items():
            out = backends[name].attend_codes(exact[0], view, None, exact[1])
            what = f"{shape.name}, {tokens} tokens, {name} bits"
            errors[name] = verify(what, out, expected[name], backends[name].tolerance)
        times = interleaved({name: route.call for name, route in routes.items()}, copies, seconds)
        found = with_speedup({name: spread(of) | {"bytes": routes[name].size} for name, of in times.items()}, BASELINE)
        for name, error in errors.items():
            found[name]["error"] = error
        yield {
            "shape": shape.name,
            "tokens": tokens,
            "threads": number,
            "copies": copies,
            "dense_bytes": copies * dense,
            "fits_cache": copies * dense < cache,
            "routes": found,
        }
