"""The roofline: arithmetic by hand, the research's table, the order of shapes, and what the command prints."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv.cli import main
from hf_seqkv.config import BITS
from hf_seqkv.errors import ConfigError
from hf_seqkv.eval import roofline, roofline_model
from hf_seqkv.eval.roofline import GPUS, Assumptions, Rate
from hf_seqkv.eval.roofline_report import verdict

LLAMA = roofline_model.load("llama-3-8b")
H100 = GPUS["h100"]
# No dense window, no launch, no instruction: bytes alone, as in the research's table.
BYTES = Assumptions(dense_tokens=0, launches=0, instructions=dict.fromkeys((16, *BITS), 0.0))


def one(context=8192, batch=1, bits=(4, 4), gpu=H100, model=LLAMA, given=None):
    return roofline.roofline(gpu, model, [context], [batch], [Rate(*bits)], given)[0]


@pytest.mark.parametrize(
    ("context", "batch", "gigabytes"),
    [(8192, 1, 1.07), (32768, 1, 4.29), (131072, 1, 17.2), (8192, 32, 34.4), (131072, 32, 550)],
)
def test_dense_bytes(context, batch, gigabytes):
    assert one(context, batch).dense.kv_bytes == batch * context * 32 * 2 * 8 * 128 * 2
    assert one(context, batch).dense.kv_bytes / 1e9 == pytest.approx(gigabytes, rel=5e-3)


@pytest.mark.parametrize(
    ("weight_bits", "context", "batch", "ratio"),
    [
        (16, 8192, 1, 1.05),
        (16, 8192, 32, 2.05),
        (16, 32768, 1, 1.20),
        (16, 131072, 8, 2.96),
        (16, 131072, 32, 3.51),
        (4.5, 8192, 1, 1.17),
        (4.5, 32768, 8, 2.89),
        (4.5, 131072, 8, 3.48),
    ],
)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_speedup_as_in_the_research(gpu, weight_bits, context, batch, ratio):
    """`shared/research/kernels.md` 3, 4 bits with a scale per 64 values, on any GPU."""
    halves = dataclasses.replace(LLAMA, kv_heads=16, head_dim=64)
    row = one(context, batch, gpu=gpu, model=halves, given=dataclasses.replace(BYTES, weight_bits=weight_bits))
    assert row.rate.bits(64) == 4.25
    assert row.speedup == pytest.approx(ratio, abs=0.0051)
    assert row.launched_speedup == row.speedup


@pytest.mark.parametrize(
    ("name", "dense", "four_bits"),
    [
        ("a100-80", 19.1, 5.1),
        ("h100", 18.5, 4.9),
        ("h200", 12.9, 3.4),
        ("b200", 9.0, 2.4),
        ("l40s", 106, 28),
        ("rtx4090", 82, 22),
        ("rtx5090", 58, 16),
        ("a10", 52, 14),
    ],
)
def test_issue_budgets_as_in_the_research(name, dense, four_bits):
    assert GPUS[name].budget(16) == pytest.approx(dense, rel=0.01)
    assert GPUS[name].budget(4.25) == pytest.approx(four_bits, rel=0.04)  # given to two digits


def test_attention_by_hand():
    """Llama-3-8B, 8k, batch 1, keys 5 and values 4 bits, 68 tokens dense, on an H100."""
    row = one(bits=(5, 4))
    values, coded, dense = 8 * 128, 8192 - 68, 68  # of a token, side and layer; tokens
    layer = values * (2 * dense * 2 + coded * (5 + 4 + 2 * 16 / 128) / 8)
    assert row.coded.kv_bytes == 32 * layer
    assert row.coded.memory_seconds == pytest.approx(32 * layer / 3.35e12)
    issued = values * (2 * dense * 2.25 + coded * (roofline.INSTRUCTIONS[5] + roofline.INSTRUCTIONS[4]))
    assert row.coded.issue_seconds == pytest.approx(32 * issued / (132 * 128 * 1.83e9))
    assert row.coded.seconds == row.coded.memory_seconds
    assert row.dense.seconds == pytest.approx(32 * 10.0e-6, rel=0.01)
    assert row.coded.launched_seconds == pytest.approx(32 * 12e-6)
    assert row.dense.launched_seconds == pytest.approx(32 * 12e-6)
    assert row.launched_speedup == pytest.approx(1)
    assert row.coded.binds == "launch"
    assert row.weight_seconds == pytest.approx((8_030_261_248 - 128256 * 4096) * 2 / 3.35e12)


def test_what_binds():
    assert one(131072, 8).coded.binds == "memory"
    b200 = one(131072, 8, (5, 5), GPUS["b200"]).coded
    assert b200.binds == "issue"
    assert b200.seconds == b200.issue_seconds
    # no launch is shorter than none
    assert one(64, 1, given=Assumptions(launch_seconds=0)).coded.binds != "launch"


def test_a_short_cache_is_dense():
    row = one(68, bits=(2, 2))
    assert row.coded == row.dense
    assert row.speedup == 1


contexts, batches = st.integers(1, 300_000), st.integers(1, 512)
rates = st.tuples(st.sampled_from(BITS), st.sampled_from(BITS))
some_gpu = st.sampled_from(list(GPUS.values()))


@given(contexts, contexts, batches, rates, some_gpu)
def test_more_tokens_take_longer(a, b, batch, bits, gpu):
    short, long = (one(context, batch, bits, gpu) for context in sorted((a, b)))
    for cache in ("dense", "coded"):
        few, many = getattr(short, cache), getattr(long, cache)
        assert few.kv_bytes <= many.kv_bytes
        assert few.seconds <= many.seconds
        assert few.launched_seconds <= many.launched_seconds
        assert few.seconds <= few.launched_seconds
        assert short.fits(few) or not long.fits(many)


@given(contexts, batches, batches, rates, some_gpu)
def test_larger_batches_gain_more(context, a, b, bits, gpu):
    small, large = (one(context, batch, bits, gpu) for batch in sorted((a, b)))
    if small.speedup >= 1:
        assert small.speedup <= large.speedup * (1 + 1e-12)
    assert large.weight_seconds == small.weight_seconds


@given(contexts, batches, rates, some_gpu)
def test_bytes_bound_the_speedup(context, batch, bits, gpu):
    row = one(context, batch, bits, gpu, given=dataclasses.replace(BYTES, weight_bits=0))
    assert row.speedup == pytest.approx(16 / Rate(*bits).bits(128))
    assert one(context, batch, bits, gpu, given=BYTES).speedup <= row.speedup
    counted = one(context, batch, bits, gpu, given=dataclasses.replace(BYTES, instructions=Assumptions().instructions))
    assert counted.coded.seconds >= row.coded.seconds


@given(contexts, batches, some_gpu)
def test_fewer_bits_read_less(context, batch, gpu):
    sizes = [one(context, batch, (bits, bits), gpu).coded.kv_bytes for bits in BITS]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("shape", "outcome", "words"),
    [
        ({"context": 8192, "batch": 1}, "none", "below the launches without CUDA graphs"),
        ({"context": 8192, "batch": 1}, "none", "memory capacity is the gain (cache x3.8 smaller)"),
        ({"context": 8192, "batch": 32}, "wins", "wins"),
        ({"context": 131072, "batch": 8}, "fits", "only the coded cache fits: 52 GB, dense 153 GB of 80"),
        ({"context": 131072, "batch": 32}, "too large", "does not fit: 158 GB of 80"),
        ({"context": 131072, "bits": (5, 5), "gpu": GPUS["b200"]}, "wins", "issue-bound at 81% of the bandwidth"),
        ({"context": 8192, "batch": 1, "given": Assumptions(launches=0)}, "none", "weights are 93% of the dense step"),
        (
            {"context": 8192, "batch": 8, "given": Assumptions(launch_seconds=1e-4)},
            "graphs",
            "wins with CUDA graphs only: a layer's attention 21.2 us, launches 300 us",
        ),
        (
            {"context": 8192, "batch": 8, "given": Assumptions(instructions={16: 2.25, 4: 40.0})},
            "loses",
            "slower than dense",
        ),
    ],
)
def test_verdict(shape, outcome, words):
    row = one(**shape)
    assert row.outcome == outcome
    assert words in verdict(row)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpu", "h1000"], "'h1000' is not one of a100-80, h100, h200, b200, l40s, rtx4090, rtx5090, a10"),
        (["--model-config", "llama3-8b"], "did you mean 'llama-3-8b'? Give a config.json, its directory"),
        (["--model-config", "no/such/model"], "one of llama-3-8b, llama-3-70b, qwen2.5-7b, smollm2-135m"),
        (["--bits", "4", "--key-bits", "5"], "leave it out"),
        (["--plot", "no/such/directory/r.png"], "no such directory"),
    ],
)
def test_errors(argv, words, capsys):
    assert main(["bench", "roofline", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("seqkv: error: ")
    assert words in error


def test_no_count_for_a_width():
    with pytest.raises(ConfigError, match=r"no instruction count for 7 bits, only for 2, 3, 4.*--instructions"):
        one(bits=(7, 7))


@pytest.mark.parametrize(
    "argv",
    [
        ["bench"],
        ["bench", "fly"],
        ["bench", "roofline", "--context", "0"],
        ["bench", "roofline", "--bits", "7"],
        ["bench", "roofline", "--launch-us", "-1"],
        ["bench", "roofline", "--weight-bits", "nan"],
        ["bench", "roofline", "--instructions", "4"],
        ["bench", "roofline", "--instructions", "4=many"],
    ],
)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: seqkv bench" in capsys.readouterr().err


def test_command(tmp_path, capsys):
    argv = ["--bits", "4", "2", "--context", "8192", "131072", "--batch", "1", "32", "--instructions", "2=20.5"]
    plot = tmp_path / "roofline.png"
    assert main(["bench", "roofline", *argv, "--launch-us", "5", "--plot", str(plot), "--json"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    result = json.loads(shown.out)
    assert [row["key_bits"] for row in result["rows"]] == [4, 2] * 4
    first = result["rows"][0]
    assert first["dense"]["kv_bytes"] == 2**30
    assert first["outcome"] == "none"
    assert first["speedup_without_graphs"] == pytest.approx(1)
    assert {row["outcome"] for row in result["rows"]} == {"none", "wins", "too large", "loses"}
    assert all(math.isfinite(row["step_seconds"]) for row in result["rows"])
    assert result["gpu"]["bandwidth"] == 3.35e12
    assert result["command"].startswith("seqkv bench roofline --bits 4 2")
    for words in (
        "3,350 GB/s, 80 GB, 132 SMs at 1.83 GHz",
        "no measurement",
        "20.5 at 2 bits",
        "3 launches of 5 us",
        "Which shapes win",
        "4/4 bits, not faster (memory capacity is the gain): 8,192 x 1 (x1.05)",
        "4/4 bits, faster, even without CUDA graphs: 8,192 x 32 (x2.05)",
        "4/4 bits, impossible: not even the coded cache fits: 131,072 x 32",
    ):
        assert words in shown.err
    assert plot.stat().st_size > 0


def test_an_estimated_count_is_marked(capsys):
    assert main(["bench", "roofline", "--bits", "6"]) == 0
    assert "6.8 at 6 bits (an estimate, not compiled)" in capsys.readouterr().err


def test_mixed_widths_take_the_mean_of_theirs(capsys):
    assert main(["bench", "roofline", "--key-bits", "3.5", "--value-bits", "2.25"]) == 0
    given, count = Assumptions(), Assumptions().instructions
    assert given.count(3.5) == pytest.approx((count[3] + count[4]) / 2)
    assert given.count(2.25) == pytest.approx(0.75 * count[2] + 0.25 * count[3])
    assert "3.5/2.25" in capsys.readouterr().err


def test_defaults_are_the_caches_own(capsys):
    """One rate, keys 5 and values 4 bits."""
    assert main(["bench", "roofline"]) == 0
    shown = capsys.readouterr()
    assert "estimate" not in shown.err
    assert shown.out == ""
    assert shown.err.count("5/4  ") == 9
    assert "3.56 at 5 bits" in shown.err
    assert "68 tokens of a row stay dense" in shown.err
