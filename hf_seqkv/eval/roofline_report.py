"""The roofline for people: what was assumed, a table, which shapes win, and a chart."""

from __future__ import annotations

import textwrap
from itertools import groupby

from .roofline import DENSE, ESTIMATES, LANES, WORTH, Assumptions, Gpu, Row
from .roofline_model import ModelShape

HEADINGS = {
    "wins": "faster, even without CUDA graphs",
    "graphs": "faster, with CUDA graphs only",
    "none": "not faster (memory capacity is the gain)",
    "fits": "possible at all: the dense cache does not fit",
    "loses": "slower",
    "too large": "impossible: not even the coded cache fits",
}
COLUMNS = {  # heading: width
    "context": 8,
    "batch": 6,
    "bits": 6,
    "KV read, GB": 15,
    "us a layer": 16,
    "binds": 8,
    "step, ms": 10,
    "graphs": 8,
    "no graphs": 11,
    "fits": 9,
}
WIDTH = 120


def assumptions(gpu: Gpu, model: ModelShape, rows: list[Row], given: Assumptions) -> list[str]:
    """Everything the numbers rest on, a sentence each."""
    widths = sorted({DENSE, *(bits for row in rows for bits in (row.rate.key_bits, row.rate.value_bits))}, reverse=True)
    counts = ", ".join(f"{given.count(bits):g} at {bits:g} bits{_origin(bits, given)}" for bits in widths)
    weights = f"{model.stored / 1e9:.2f}e9 parameters, {model.read(1) / 1e9:.2f}e9 read at batch 1"
    said = [
        f"{gpu.name}, its data sheet: {gpu.bandwidth / 1e9:,.0f} GB/s, {gpu.memory / 1e9:.0f} GB, {gpu.sms} SMs at "
        f"{gpu.clock / 1e9:.2f} GHz, {LANES} instructions of a lane a clock and SM",
        f"{model.name}: {weights}, at {given.weight_bits:g} bits; {len(model.windows)} layers with a cache, "
        f"{model.kv_heads} KV heads of {model.head_dim}",
        "100 % of bandwidth and issue rate are reached, by both caches' kernels and for the weights; no measurement",
        f"instructions a code: {counts}; for head_dim 128, pipes narrower than the issue rate and latency not counted",
        f"codes and a bf16 scale a token, head and side are read; {given.dense_tokens} tokens of a row stay dense",
        f"without CUDA graphs a layer's attention takes at least {given.launches} launches of "
        f"{given.launch_seconds * 1e6:g} us, not hidden behind other work, with either cache",
        "weights are read once a step (no arithmetic bound: a few hundred sequences at most), the input embedding not; "
        "activations and everything else take neither time nor memory",
    ]
    if model.moe_layers:
        said.append(f"{model.experts_per_token} of {model.experts} experts a token, chosen evenly and independently")
    if model.head_dim != 128:
        said.append(f"instructions were not counted for head_dim {model.head_dim}: there they are likely more")
    return [*said, *model.notes]


def _origin(bits: float, given: Assumptions) -> str:
    estimated = bits in ESTIMATES and given.instructions[bits] == ESTIMATES[bits]
    return " (an estimate, not compiled)" if estimated else ""


def table(gpu: Gpu, model: ModelShape, rows: list[Row], given: Assumptions) -> str:
    """Assumptions, a line a row, the verdict on each, and a summary."""
    lines = ["The least time of a decode step, from a data sheet and compiler counts; assumed:"]
    wrap = {"width": WIDTH, "initial_indent": "  - ", "subsequent_indent": "    "}
    lines += [textwrap.fill(line, **wrap) for line in assumptions(gpu, model, rows, given)]
    lines += ["", "dense > coded; attention a layer and the step with CUDA graphs; what binds without them;"]
    lines += ["speed-up of the whole step with and without CUDA graphs; the cache that fits beside the weights"]
    lines += [_cells(COLUMNS) + "   verdict", *(_line(row) for row in rows)]
    return "\n".join([*lines, "", *summary(rows)])


def _cells(cells) -> str:
    return "".join(f"{cell!s:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def _line(row: Row) -> str:
    cells = (
        f"{row.context:,}",
        row.batch,
        row.rate.name,
        f"{_gigabytes(row.dense.kv_bytes)} > {_gigabytes(row.coded.kv_bytes)}",
        f"{_microseconds(row, row.dense.seconds)} > {_microseconds(row, row.coded.seconds)}",
        row.coded.binds,
        f"{(row.weight_seconds + row.coded.seconds) * 1e3:.2f}",
        f"x{row.speedup:.2f}",
        f"x{row.launched_speedup:.2f}",
        "both" if row.fits(row.dense) else "coded" if row.fits(row.coded) else "neither",
    )
    return f"{_cells(cells)}   {verdict(row)}"


def verdict(row: Row) -> str:
    """What a row means, in words."""
    share = row.weight_seconds / (row.weight_seconds + row.dense.seconds)
    smaller = row.dense.kv_bytes / row.coded.kv_bytes
    needs = {"dense": row.dense, "coded": row.coded}
    needs = {name: f"{(row.weight_bytes + cache.kv_bytes) / 1e9:.0f} GB" for name, cache in needs.items()}
    if row.outcome == "too large":
        return f"does not fit: {needs['coded']} of {row.gpu.memory / 1e9:.0f}"
    if row.outcome == "fits":
        return f"only the coded cache fits: {needs['coded']}, dense {needs['dense']} of {row.gpu.memory / 1e9:.0f}"
    if row.outcome == "wins":
        return "wins" + (f", issue-bound at {_bandwidth(row):.0%} of the bandwidth" if _bandwidth(row) < 0.995 else "")
    if row.outcome == "loses":
        return "slower than dense: expanding the codes takes longer than reading the values"
    attention = f"attention {_microseconds(row, row.coded.seconds)} us, launches {row.launches_seconds * 1e6:g} us"
    if row.outcome == "graphs":
        return f"wins with CUDA graphs only: a layer's {attention}"
    why = f"weights are {share:.0%} of the dense step"
    if row.coded.binds == "launch":
        why = f"below the launches without CUDA graphs (a layer's {attention}); {why}"
    return f"no gain in speed: {why}; memory capacity is the gain (cache x{smaller:.1f} smaller)"


def _bandwidth(row: Row) -> float:
    """Share of the bandwidth that the coded cache's attention can use, its codes having to be expanded."""
    return row.coded.memory_seconds / row.coded.seconds


def summary(rows: list[Row]) -> list[str]:
    """Which shapes win and which do not, a line an outcome and rate."""
    order = list(HEADINGS)
    ranked = sorted(rows, key=lambda row: (order.index(row.outcome), row.rate.name))
    lines = [f"Which shapes win, for kernels equally close to their bounds (below x{WORTH} is called no gain):"]
    for (outcome, rate), group in groupby(ranked, key=lambda row: (row.outcome, row.rate.name)):
        group = list(group)
        shapes = ", ".join(f"{row.context:,} x {row.batch}{_gain(row)}" for row in group)
        lines.append(f"  {rate} bits, {HEADINGS[outcome]}: {shapes}")
    return lines


def _gain(row: Row) -> str:
    if row.outcome in ("fits", "too large"):
        return ""
    return f" (x{row.launched_speedup if row.outcome == 'wins' else row.speedup:.2f})"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"


def _microseconds(row: Row, seconds: float) -> str:
    """Of one layer, on average."""
    us = seconds / row.layers * 1e6
    return f"{us:,.0f}" if us >= 100 else f"{us:.3g}"


def plot(gpu: Gpu, model: ModelShape, rows: list[Row], path: str) -> None:
    """Chart of a layer's attention and of the step's speed-up over the context; the file's suffix is its format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    time, gain = figure.subplots(1, 2)
    rates = dict.fromkeys(row.rate.name for row in rows)
    for i, batch in enumerate(sorted({row.batch for row in rows})):
        for rate, style in zip(rates, ("-", "-.", ":") * len(rates), strict=False):
            of = sorted((r for r in rows if (r.batch, r.rate.name) == (batch, rate)), key=lambda row: row.context)
            contexts, look = [row.context for row in of], {"marker": "o", "color": f"C{i}"}
            if rate == next(iter(rates)):
                dense = [row.dense.seconds / row.layers * 1e6 for row in of]
                time.plot(contexts, dense, "--", label=f"bf16, batch {batch}", **look)
            look |= {"linestyle": style, "label": f"{rate} bits, batch {batch}"}
            time.plot(contexts, [row.coded.seconds / row.layers * 1e6 for row in of], **look)
            both = [row.speedup if row.fits(row.dense) and row.fits(row.coded) else float("nan") for row in of]
            gain.plot(contexts, both, **look)
    time.axhline(rows[0].launches_seconds * 1e6, color="grey", label="launches without CUDA graphs")
    gain.axhline(1, color="grey")
    time.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="us", title="attention of a layer, at least")
    gain.set(
        xscale="log",
        xlabel="context, tokens",
        ylabel="dense step / coded step",
        title="speed-up with CUDA graphs, where both fit",
    )
    figure.suptitle(f"{model.name} on {gpu.name}: from a data sheet and compiler counts, nothing measured")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=150)
