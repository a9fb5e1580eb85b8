"""What a GPU could do at best in a decode step: bytes, instructions and launches against a spec sheet.

    attention of a layer = max(bytes / bandwidth, instructions / issue rate[, launches * launch time])
    step                 = weights / bandwidth + attention of every layer

Nothing here is measured: the GPU's numbers are its vendor's, instructions a code are a compiler's count, and both
caches get a kernel that reaches 100 % of the peak. Times are lower bounds; a speed-up is the ratio of two of them, as
kernels give that come equally close to their bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..config import SeqKVConfig
from ..errors import ConfigError
from .roofline_model import ModelShape

LANES = 128  # an SM's 4 schedulers each issue one instruction of a warp, 32 lanes, a clock
WORTH = 1.1  # a smaller speed-up is not called one: the bounds are not that sharp
DENSE = 16  # bits of a dense value


@dataclass(frozen=True)
class Gpu:
    """A spec sheet: bytes a second, bytes, streaming multiprocessors, boost clock in Hz."""

    name: str
    bandwidth: float
    memory: float
    sms: int
    clock: float

    @property
    def issue_rate(self) -> float:
        """Instructions of one lane, a second."""
        return self.sms * LANES * self.clock

    def budget(self, bits: float) -> float:
        """Instructions a code of `bits` that can be issued in the time of reading it."""
        return self.issue_rate * bits / 8 / self.bandwidth


# What NVIDIA's data sheets and architecture white papers are quoted with: bandwidth, memory, SMs, boost clock. B200's
# clock is not published: 1.9 GHz follows from its rates.
GPUS = {
    # A100 80GB SXM data sheet (2,039 GB/s); A100 white paper: 108 SMs, 1410 MHz
    "a100-80": Gpu("A100 80GB SXM", 2039e9, 80e9, 108, 1.410e9),
    # H100 data sheet, SXM (3.35 TB/s); H100 white paper: 132 SMs, 1830 MHz with tensor cores (1980 without)
    "h100": Gpu("H100 SXM", 3350e9, 80e9, 132, 1.830e9),
    # H200 data sheet (4.8 TB/s, 141 GB); the chip is the H100's
    "h200": Gpu("H200 SXM", 4800e9, 141e9, 132, 1.830e9),
    # DGX B200 data sheet (8 GPUs: 64 TB/s, 1,440 GB); 148 SMs. No clock is published: its dense FP16 rate
    # (2.25 PFLOP/s) implies 1.86 GHz, its FP32 rate (75 TFLOP/s) 1.98
    "b200": Gpu("B200 SXM", 8000e9, 180e9, 148, 1.900e9),
    # L40S data sheet (864 GB/s, 18,176 cores of 128 an SM), boost 2520 MHz
    "l40s": Gpu("L40S", 864e9, 48e9, 142, 2.520e9),
    # Ada white paper: GeForce RTX 4090
    "rtx4090": Gpu("GeForce RTX 4090", 1008e9, 24e9, 128, 2.520e9),
    # RTX Blackwell white paper: GeForce RTX 5090
    "rtx5090": Gpu("GeForce RTX 5090", 1792e9, 32e9, 170, 2.407e9),
    # A10 data sheet (600 GB/s, 24 GB); 72 SMs, boost 1695 MHz
    "a10": Gpu("A10", 600e9, 24e9, 72, 1.695e9),
}

# Instructions a code in the hot loop, softmax and products included, per KV head whatever its query heads: SASS
# instructions x 32 lanes x warps / codes, from ahead-of-time compiles for head_dim 128, 4 query heads a KV head.
# Those of codes are what `tests/triton_aot.py` prints for sm_80 and sm_90; the kernel of centred keys, a quarter of the
# whole on an H200, is left out. 16 bits is a dense Triton kernel. A bound is no forecast: 8 x 131,072 tokens of 32 / 8
# heads took an H200 1.8 times as long at 4 bits, as `bench kernels --device cuda` measured.
INSTRUCTIONS = {16: 2.25, 8: 6.8, 5: 3.56, 4: 2.25, 3: 2.17, 2: 1.7}
ESTIMATES = {6: 6.8}  # not compiled: gathered, as 8 bits are


def gpu(name: str) -> Gpu:
    """The GPU of a name in `GPUS`, in any case.

    Raises:
        ConfigError: There is no such name; the message lists them.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name!r} is not one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Rate:
    """Bits of a code of keys and of values; a coded vector has one bf16 scale besides."""

    key_bits: float
    value_bits: float

    @property
    def name(self) -> str:
        return f"{self.key_bits:g}/{self.value_bits:g}"

    def bits(self, head_dim: int) -> float:
        """Bits a value in a page, the scales counted."""
        return (self.key_bits + self.value_bits) / 2 + 16 / head_dim


def _dense_tokens() -> int:
    """Sinks and recent tokens: between `residual_length` and a page more of these, half a page on average."""
    config = SeqKVConfig()
    return config.n_sink + config.residual_length + config.page_size // 2


@dataclass(frozen=True)
class Assumptions:
    """What no spec sheet says.

    Args:
        weight_bits: Bits a parameter, scales of quantised weights counted.
        dense_tokens: Tokens of each row that the coded cache keeps dense.
        launches: Kernels that a layer's attention starts, with either cache.
        launch_seconds: Time of one start without CUDA graphs, taken as not hidden behind other work.
        instructions: Instructions a code, by its bits.
    """

    weight_bits: float = 16
    dense_tokens: int = field(default_factory=_dense_tokens)
    launches: int = 3
    launch_seconds: float = 4e-6
    instructions: Mapping[float, float] = field(default_factory=lambda: INSTRUCTIONS | ESTIMATES)

    def count(self, bits: float) -> float:
        """Instructions a code of `bits`; a mean of two widths, as calibrations mix them, takes the mean of theirs.

        Raises:
            ConfigError: Nobody counted them for this width.
        """
        low = math.floor(bits)
        if bits not in self.instructions and {low, low + 1} <= set(self.instructions):
            return self.instructions[low] + (bits - low) * (self.instructions[low + 1] - self.instructions[low])
        if bits not in self.instructions:
            known = ", ".join(f"{width:g}" for width in sorted(self.instructions))
            raise ConfigError(f"no instruction count for {bits:g} bits, only for {known}; give --instructions")
        return self.instructions[bits]


@dataclass(frozen=True)
class Attention:
    """All layers' attention in one step, with one cache.

    Args:
        kv_bytes: Read, and held.
        memory_seconds, issue_seconds: Of reading, and of issuing; a layer takes the longer.
        seconds: With CUDA graphs: no launch counted.
        launched_seconds: Without: a layer takes no less than its launches.
        binds: What most of `launched_seconds` waits for: `"memory"`, `"issue"` or `"launch"`.
    """

    kv_bytes: float
    memory_seconds: float
    issue_seconds: float
    seconds: float
    launched_seconds: float
    binds: str


def attention(
    gpu: Gpu, model: ModelShape, context: int, batch: int, rate: Rate | None, given: Assumptions
) -> Attention:
    """Bound of a step's attention; `rate` is None for the dense bf16 cache."""
    started = given.launches * given.launch_seconds
    total = {"bytes": 0.0, "memory": 0.0, "issue": 0.0, "seconds": 0.0, "launched": 0.0}
    waits = {"memory": 0.0, "issue": 0.0, "launch": 0.0}
    for window in model.windows:
        tokens = context if window is None else min(context, window)
        dense = tokens if rate is None else min(tokens, given.dense_tokens)
        bits, instructions = 2 * dense * DENSE, 2 * dense * given.count(DENSE)
        if rate is not None:
            coded = tokens - dense
            bits += 2 * coded * rate.bits(model.head_dim)
            instructions += coded * (given.count(rate.key_bits) + given.count(rate.value_bits))
        values = batch * model.kv_heads * model.head_dim  # of a token, of one side
        terms = {"memory": values * bits / 8 / gpu.bandwidth, "issue": values * instructions / gpu.issue_rate}
        total["bytes"] += values * bits / 8
        total["seconds"] += max(terms.values())
        for name, seconds in terms.items():
            total[name] += seconds
        terms["launch"] = started
        longest = max(terms, key=terms.get)
        total["launched"] += terms[longest]
        waits[longest] += terms[longest]
    return Attention(*total.values(), binds=max(waits, key=waits.get))


@dataclass(frozen=True)
class Row:
    """One context, batch and rate: both caches' attention beside the same weights.

    Args:
        layers: Layers with a cache.
        weight_seconds: Of reading the weights.
        weight_bytes: Held, not read: the input embedding and every expert count.
        launches_seconds: Of starting one layer's attention without CUDA graphs.
    """

    gpu: Gpu
    context: int
    batch: int
    rate: Rate
    layers: int
    weight_seconds: float
    weight_bytes: float
    launches_seconds: float
    dense: Attention
    coded: Attention

    @property
    def speedup(self) -> float:
        """Of the whole step, with CUDA graphs."""
        return (self.weight_seconds + self.dense.seconds) / (self.weight_seconds + self.coded.seconds)

    @property
    def launched_speedup(self) -> float:
        """Of the whole step, without CUDA graphs."""
        dense, coded = self.dense.launched_seconds, self.coded.launched_seconds
        return (self.weight_seconds + dense) / (self.weight_seconds + coded)

    def fits(self, cache: Attention) -> bool:
        return self.weight_bytes + cache.kv_bytes <= self.gpu.memory

    @property
    def outcome(self) -> str:
        """One of `"too large"`, `"fits"` (the coded cache only), `"wins"`, `"graphs"`, `"none"` and `"loses"`."""
        if not self.fits(self.coded):
            return "too large"
        if not self.fits(self.dense):
            return "fits"
        if self.speedup < 1 - 1e-9:
            return "loses"
        if self.launched_speedup >= WORTH:
            return "wins"
        return "graphs" if self.speedup >= WORTH else "none"

    def to_dict(self) -> dict:
        """JSON types; bytes and seconds."""
        parts = {"dense": self.dense, "coded": self.coded}
        return {
            "context": self.context,
            "batch": self.batch,
            "key_bits": self.rate.key_bits,
            "value_bits": self.rate.value_bits,
            "weight_bytes": self.weight_bytes,
            "weight_seconds": self.weight_seconds,
            **{name: vars(part) | {"fits": self.fits(part)} for name, part in parts.items()},
            "step_seconds": self.weight_seconds + self.coded.seconds,
            "step_seconds_without_graphs": self.weight_seconds + self.coded.launched_seconds,
            "speedup": self.speedup,
            "speedup_without_graphs": self.launched_speedup,
            "outcome": self.outcome,
        }


def roofline(
    gpu: Gpu,
    model: ModelShape,
    contexts: Iterable[int],
    batches: Iterable[int],
    rates: Iterable[Rate],
    given: Assumptions | None = None,
) -> list[Row]:
    """A row for every context, batch and rate, in this order."""
    given = given or Assumptions()
    rows = []
    shapes = [(context, batch, rate) for context in contexts for batch in batches for rate in rates]
    for context, batch, rate in shapes:
        rows.append(
            Row(
                gpu=gpu,
                context=context,
                batch=batch,
                rate=rate,
                layers=len(model.windows),
                weight_seconds=model.read(batch) * given.weight_bits / 8 / gpu.bandwidth,
                weight_bytes=model.stored * given.weight_bits / 8,
                launches_seconds=given.launches * given.launch_seconds,
                dense=attention(gpu, model, context, batch, None, given),
                coded=attention(gpu, model, context, batch, rate, given),
            )
        )
    return rows
