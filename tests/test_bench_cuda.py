"""`bench kernels --device cuda` and `bench decode --model-config`: what of them needs no GPU, and on one all of it."""

import json

import pytest
import torch
from models import tiny
from pretend import pretended

from hf_seqkv.cli import main
from hf_seqkv.errors import ConfigError
from hf_seqkv.eval import bench_cuda, bench_decode, bench_report
from hf_seqkv.eval.bench_kernels import make_view
from hf_seqkv.eval.bench_shapes import Rate, Shape, page_codec

CUDA = torch.cuda.is_available()


def spread(median):
    return {"median": median, "speedup": 2e-5 / median}


def test_report():
    ways = {"sdpa": (2e-5, 3e-5), "4/4": (1e-5, 4e-5)}
    routes = {
        name: {"device": spread(a), "eager": spread(b), "bytes": 1e7, "gigabytes_per_second": 1e7 / a / 1e9}
        for name, (a, b) in ways.items()
    }
    routes["4/4"]["error"] = 3e-3
    machine = {"cpu": "a", "cores": 2, "last_level_cache": 2**20, "system": "b"}
    machine["versions"] = {"hf_seqkv": "0", "torch": "1", "transformers": "2"}
    result = {
        "machine": machine, "gpu": {"name": "G", "multiprocessors": 7, "cache": 2**21}, "backend": "triton",
        "command": "c", "dtype": "bfloat16", "baseline": "sdpa",
        "rows": [{"shape": "4/2x64", "tokens": 512, "batch": 3, "copies": 5, "routes": routes}],
    }  # fmt: skip
    lines = bench_report.cuda_kernels(result).splitlines()
    assert lines[0] == "G, 7 multiprocessors, L2 2 MiB"
    assert lines[-5].split() == ["512", "3", "5", "20", "us", "x1.00", "10", "us", "x2.00"]
    assert lines[-4].split() == ["500", "GB/s", "1000", "GB/s"]
    assert lines[-3].split() == ["30", "us", "x0.67", "40", "us", "x0.50"]
    assert lines[-1] == "largest difference from the reference: 3.0e-03 of the largest output"


def test_views_move_whole():
    """Every tensor of a view, its codec's included."""
    view = make_view(page_codec(Shape(4, 2, 32), Rate(4, 4, True), 64), 300, True, torch.bfloat16, batch=2)
    assert (view.counts, view.recent.k.shape[0], view.center.starts.shape[0]) == ([4, 4], 2, 2)
    with pretended():
        moved = bench_cuda.on_device(view, torch.device("cuda:0"))
        parts = [moved.pages, moved.sinks.k, moved.recent.v, moved.center.mean, *moved.codec.tables]
        assert {str(x.device) for x in parts} == {"cuda:0"}
    assert moved.counts == view.counts


@pytest.mark.skipif(CUDA, reason="there is a GPU")
@pytest.mark.parametrize("verb", ["kernels", "decode"])
def test_no_gpu(verb, capsys):
    assert main(["bench", verb, "--device", "cuda"]) == 1
    assert "no CUDA device 'cuda' here; leave --device out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--batch", "2"], "--batch is for a GPU"), (["--device", "cuda", "--warm"], "are for the processor"),
     (["--device", "cuda", "--threads", "1"], "are for the processor")],
)  # fmt: skip
def test_options_of_the_other_kind_are_refused(argv, words, capsys):
    assert main(["bench", "kernels", *argv]) == 1
    assert words in capsys.readouterr().err


def test_no_cpu():
    with pytest.raises(ConfigError, match="no CUDA device 'cpu'"):
        bench_cuda.gpu("cpu")


def test_steps_of_random_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_SEQKV_BACKEND", "reference")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny("llama").config.to_dict()))
    argv = ["--model-config", str(path), "--context", "120", "--new-tokens", "2", "--batch", "3", "--dtype", "float32"]
    assert main(["bench", "decode", *argv, "--caches", "dynamic", "seqkv", "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    (run,) = result["runs"]
    assert (result["gpu"], result["model"], run["batch"]) == (None, f"{path}, random weights", 3)
    found = run["caches"]["seqkv"]
    assert found["tokens_per_second"] == 3 / found["step"]["median"]
    assert "120 tokens of 3 sequences and 2 steps" in shown.err


def test_random_weights_are_the_same_twice(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen2").config.to_dict()))
    state = torch.random.get_rng_state()
    first, second = (bench_decode.random_model(str(tmp_path), torch.bfloat16, "cpu") for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert first.dtype == torch.bfloat16


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_kernels_command(capsys):
    argv = ["--device", "cuda", "--shape", "4/2x64", "--tokens", "512", "--batch", "2", "--bits", "4", "5/4c"]
    assert main(["bench", "kernels", *argv, "--seconds", "0.02", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert list(row["routes"]) == ["sdpa", "bmm", "DynamicCache", "4/4", "5/4c"]
    assert all(found[clock]["median"] > 0 for found in row["routes"].values() for clock in ("device", "eager"))
