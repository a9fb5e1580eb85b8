"""`bench kernels` and `bench decode`: the ways agree, the arithmetic of times, and what the commands print."""

import itertools
import json
import statistics

import pytest
import torch
from models import SMALL, prompt, tiny

from hf_seqkv.cli import main
from hf_seqkv.errors import BackendError, ConfigError
from hf_seqkv.eval import bench_decode, bench_kernels, bench_report, bench_timing, passages, smollm2
from hf_seqkv.eval.bench_kernels import BASELINE
from hf_seqkv.eval.bench_shapes import Rate, Shape, page_codec
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.kernels import interface, reference

SHAPE = Shape(6, 2, 32)


@pytest.fixture
def reference_backend(monkeypatch):
    """No compiler: these tests are about the bench."""
    monkeypatch.setenv("HF_SEQKV_BACKEND", "reference")


# -- times -------------------------------------------------------------------------------------------------------------


def test_spread():
    assert bench_timing.spread([4.0, 1.0, 2.0, 3.0, 10.0]) == {
        "median": 3.0, "q1": 2.0, "q3": 4.0, "mean": 4.0, "calls": 5,
    }  # fmt: skip


def test_speedup_is_the_ratio_of_medians():
    found = bench_timing.with_speedup({"a": {"median": 6.0}, "b": {"median": 1.5}, "c": {"median": 8.0}}, "a")
    assert [found[name]["speedup"] for name in "abc"] == [1.0, 4.0, 0.75]


def test_against_the_faster_dense_cache():
    steps = {"dynamic": 5.0, "static": 4.0, "seqkv": 2.0}
    found, baseline = bench_decode.against_dense({name: {"step": {"median": s}} for name, s in steps.items()})
    assert baseline == "static"
    assert {name: entry["speedup"] for name, entry in found.items()} == {"dynamic": 0.8, "static": 1, "seqkv": 2}
    found, baseline = bench_decode.against_dense({"seqkv": {"step": {"median": 2.0}}})
    assert (found["seqkv"]["speedup"], baseline) == (None, None)


def test_interleaved(monkeypatch):
    """All ways once a round in shuffled order; slow ones stop after the least calls; copies are taken in turn."""
    clock, calls = itertools.count(), []
    durations = {"fast": 0, "slow": 10}  # beyond the one second between two looks at the clock
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: next(clock))

    def call(name):
        def called(i):
            calls.append((name, i))
            for _ in range(durations[name]):
                next(clock)

        return called

    times = bench_timing.interleaved({name: call(name) for name in durations}, 3, 100)
    assert times == {"fast": [1] * 51, "slow": [11] * 5}
    assert calls[:2] == [("fast", 2), ("slow", 2)]  # the first of each is not counted
    rounds = [calls[i : i + 2] for i in range(2, 12, 2)]
    assert [{name for name, _ in turn} for turn in rounds] == [{"fast", "slow"}] * 5
    assert len({turn[0][0] for turn in rounds}) == 2
    assert [i for name, i in calls[2:] if name == "fast"] == [i % 3 for i in range(51)]


@pytest.mark.parametrize(
    ("dense", "whole", "warm", "copies"),
    [(1 << 20, 4 << 20, False, 30), (10 << 20, 40 << 20, False, 13), (268e6, 1.1e9, False, 1), (1, 4, True, 1)],
    ids=["as many as layers", "beyond the cache", "one is enough", "warm"],
)
def test_copies(dense, whole, warm, copies):
    assert bench_kernels.copy_count(int(dense), int(whole), 32 << 20, warm) == copies


def test_memory_is_bounded():
    assert bench_kernels.copy_count(1 << 30, 3 << 30, 1 << 30, False) == 1
    with pytest.raises(ConfigError, match=r"a copy takes 5\.0 GB, more than 4; ask for fewer tokens"):
        bench_kernels.copy_count(int(1e9), int(5e9), 32 << 20, False)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [((8.42e-5,), "84.2 us"), ((8.21e-5, 1.2e-4), "82.1-120 us"), ((0.4998,), "500 ms"), ((1.5,), "1.5 s")],
)
def test_duration(seconds, text):
    assert bench_report.duration(*seconds) == text


# -- kernels -----------------------------------------------------------------------------------------------------------


def test_dense_ways_agree():
    query, keys, values = torch.randn(1, 6, 1, 32), *torch.randn(2, 1, 2, 50, 32).bfloat16()
    routes = bench_kernels.dense_routes(SHAPE, query, keys, values, 2)
    assert list(routes) == [BASELINE, "bmm fp32", "sdpa bf16", "sdpa fp32", "DynamicCache"]
    assert [route.size for route in routes.values()] == [2 * 2 * 50 * 32 * n for n in (2, 4, 2, 4, 4)]
    expected = routes["sdpa fp32"].call(0)
    for name, route in routes.items():
        for i in (0, 1, 0):
            out = route.call(i)
            assert out.shape == (6, 32)
            torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0, msg=name)


def test_quarters_are_runs_of_two_widths():
    codec = page_codec(Shape(4, 2, 64), Rate(3.5, 2.25), 64)
    assert codec.key.widths.tolist() == [[4] * 32 + [3] * 32] * 2
    assert codec.value.widths.tolist() == [[3] * 16 + [2] * 48] * 2
    assert codec.key.levels.diff()[0, [3, 4], 1:7].gt(0).all()
    assert Rate(3.5, 2.25, True).name == "3.5/2.25c"


@pytest.mark.parametrize("center", [False, True])
def test_view(center):
    """A cache of so many tokens, of which the kernel sees every one."""
    codec = page_codec(SHAPE, Rate(5, 4), 64)
    view = bench_kernels.make_view(codec, 400, center, torch.bfloat16)
    assert view.length == 400
    assert view.counts == [5]  # of 64, after 4 and before at least 32
    assert view.sinks.k.shape[2] + 5 * 64 + view.recent.k.shape[2] == 400
    assert view.recent.slots == [324]
    assert (view.center is not None) is center
    route = bench_kernels.coded_route(view, torch.randn(1, 6, 1, 32), reference.attend_codes, 2)
    assert torch.equal(route.call(0), route.call(1))
    assert route.call(0).shape == (6, 32)


def test_rows(reference_backend):
    threads = torch.get_num_threads()
    rows = bench_kernels.bench([SHAPE], [128, 300], [Rate(4, 4), Rate(5, 4, True)], [1], seconds=0.01, progress=False)
    assert torch.get_num_threads() == threads
    assert [(row["shape"], row["tokens"], row["threads"], row["copies"]) for row in rows] == [
        ("6/2x32", 128, 1, 30), ("6/2x32", 300, 1, 30),
    ]  # fmt: skip
    for row in rows:
        assert row["dense_bytes"] == 30 * row["tokens"] * 2 * 32 * 2 * 2
        assert row["fits_cache"]
        assert list(row["routes"])[-2:] == ["4/4", "5/4c"]
        for found in row["routes"].values():
            assert 0 < found["q1"] <= found["median"] <= found["q3"]
            assert found["calls"] >= bench_timing.LEAST
            assert found["speedup"] == row["routes"][BASELINE]["median"] / found["median"]
        assert row["routes"]["4/4"]["error"] == 0


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    def slightly_wrong(*args):
        return reference.attend_codes(*args) * 1.001

    wrong = interface.Backend("cpu", slightly_wrong, reference.encode_pages, reference.unpack_pages, 5e-4)
    monkeypatch.setattr(bench_kernels, "select_backend", lambda *args: wrong)
    monkeypatch.setattr(bench_kernels, "interleaved", lambda *args: pytest.fail("timed"))
    with pytest.raises(BackendError, match=r"6/2x32, 128 tokens, 4/4 bits: .* by 1\.0e-03 of the largest output"):
        bench_kernels.bench([SHAPE], [128], [Rate(4, 4)], [1], progress=False)


def test_nan_is_wrong():
    with pytest.raises(BackendError, match="nan of the largest"):
        bench_kernels.verify("x", torch.tensor([1.0, torch.nan]), torch.ones(2), 1.0)


def test_kernels_command(reference_backend, capsys):
    argv = ["--shape", "6/2x32", "--tokens", "128", "--bits", "4", "3.5/2.5", "--center", "--threads", "1"]
    assert main(["bench", "kernels", *argv, "--seconds", "0.01", "--json"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    result = json.loads(shown.out)
    assert result["command"].startswith("seqkv bench kernels --shape 6/2x32")
    assert result["backend"] == "reference"
    dense = [BASELINE, "bmm fp32", "sdpa bf16", "sdpa fp32", "DynamicCache"]
    assert list(result["rows"][0]["routes"]) == [*dense, "4/4c", "3.5/2.5c"]
    for words in (result["command"], "6/2x32 (query heads", "30*", "x1.00", "fit the last-level cache", "reference: 0"):
        assert words in shown.err


def test_compiled_kernel(capsys):
    """What `auto` selects passes its own check, over cold copies and a warm one."""
    argv = ["--shape", "6/2x32", "--tokens", "300", "--threads", "1", "--seconds", "0.01", "--warm", "--json"]
    assert main(["bench", "kernels", *argv]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["copies"] == 1
    assert list(row["routes"])[-3:] == ["4/4", "2/2", "5/4c"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--tokens", "99"], "99 tokens hold no page; ask for at least 100"), (["--tokens", "9000000"], "fewer tokens")],
)
def test_kernels_errors(reference_backend, argv, words, capsys):
    assert main(["bench", "kernels", *argv]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["kernels", "--shape", "32x128"],
        ["kernels", "--bits", "4.1"],
        ["kernels", "--bits", "six"],
        ["kernels", "--shape", "9/2x64"],
        ["kernels", "--shape", "8/0x64"],
        ["kernels", "--bits", "7"],
        ["kernels", "--bits", "4/c"],
        ["kernels", "--bits", "4/4/4"],
        ["kernels", "--threads", "0"],
        ["decode", "--caches", "quantized"],
        ["decode", "--new-tokens", "1"],
        ["decode", "--option", "key_bits"],
    ],
)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *argv])
    assert stopped.value.code == 2
    assert "usage: seqkv bench" in capsys.readouterr().err


# -- decode ------------------------------------------------------------------------------------------------------------

OPTIONS = {**SMALL, "backend": "reference"}


def test_decode():
    """Every cache makes the steps; ours makes a page of 8 tokens every 8 steps."""
    result = bench_decode.bench(tiny("llama"), prompt()[0], 16, options=OPTIONS, progress=False)
    assert (result["context"], result["new_tokens"]) == (45, 16)
    assert result["baseline"] in ("dynamic", "static")
    base = result["caches"][result["baseline"]]["step"]["median"]
    for found in result["caches"].values():
        assert len(found["step_seconds"]) == 16
        assert found["step"]["median"] == statistics.median(found["step_seconds"])
        assert found["tokens_per_second"] == 1 / found["step"]["median"]
        assert found["speedup"] == base / found["step"]["median"]
        assert found["prefill_seconds"] > 0
    pages = result["caches"]["seqkv"]["pages"]
    assert pages["steps"] == 2
    assert 0 < pages["prefill_share"] < 1
    assert 0 < pages["decode_share"] < 1
    assert pages["prefill_share"] == pages["prefill_seconds"] / result["caches"]["seqkv"]["prefill_seconds"]


def test_caches_see_the_same():
    """Prefill and steps through each cache give the model's own result; ours with lossless pages."""
    model, ids = tiny("llama"), prompt()[0]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
        for name in bench_decode.CACHES["cpu"]:
            options = {"method": "dense", **SMALL}
            cache = bench_decode.make_cache(name, model.config, 45, options)
            for at in (slice(0, 40), *(slice(i, i + 1) for i in range(40, 44))):
                assert bench_decode.forward(model, ids[:, at], cache, at.start) > 0
            out = model(ids[:, 44:], **{CACHE_NAME: cache}).logits[:, -1]
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4, msg=name)


def test_more_steps_than_context():
    with pytest.raises(ConfigError, match="46 new tokens are more than the context's 45"):
        bench_decode.bench(tiny("llama"), prompt()[0], 46, progress=False)


def test_long_prompts_repeat(monkeypatch):
    monkeypatch.setattr(bench_decode, "TEXT", 10)
    monkeypatch.setattr(passages, "prompt", lambda tokenizer, length: torch.arange(length)[None])
    assert bench_decode.prompt(None, 7).tolist() == [list(range(7))]
    assert bench_decode.prompt(None, 23).tolist() == [[*range(10), *range(10), *range(3)]]


def test_decode_command(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "load", lambda dtype: (tiny("llama").to(dtype), None, "tiny"))
    monkeypatch.setattr(passages, "prompt", lambda tokenizer, length: prompt(tokens=length)[0])
    argv = ["--context", "60", "--new-tokens", "8", "--dtype", "float32", "--threads", "1", "--json"]
    options = [f"--option={name}={value}" for name, value in OPTIONS.items()]
    threads = torch.get_num_threads()
    assert main(["bench", "decode", *argv, *options]) == 0
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    result = json.loads(shown.out)
    assert (result["model"], result["threads"], result["backend"]) == ("tiny", 1, "reference")
    assert result["options"]["page_size"] == 8
    (run,) = result["runs"]
    assert (run["dtype"], run["context"], list(run["caches"])) == ("float32", 60, ["dynamic", "static", "seqkv"])
    for words in ("float32, 60 tokens and 8 steps", "making pages: ", "1 made any", f"of {run['baseline']}"):
        assert words in shown.err
    assert main(["bench", "decode", *argv, *options, "--caches", "seqkv"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["baseline"], run["caches"]["seqkv"]["speedup"]) == (None, None)


def test_decode_errors(capsys):
    assert main(["bench", "decode", "--option", "keybits=3"]) == 1
    assert "did you mean 'key_bits'" in capsys.readouterr().err
