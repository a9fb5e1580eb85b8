"""On a real GPU: the whole cache, with the Triton kernels, side streams, pinned memory. Skipped where there is none."""

import copy
from unittest import mock

import pytest
import torch
from kernel_cases import Case, build
from models import CONFIGS, prompt, tiny
from test_held import by_content, holding

from hf_seqkv import SeqKVCache
from hf_seqkv.errors import SeqKVWarning
from hf_seqkv.eval.bench_cuda import on_device
from hf_seqkv.integration import graphed_steps
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.state import state_of
from hf_seqkv.integration.step_graph import StepGraph
from hf_seqkv.store.prefix_store import PrefixStore

triton_attend = pytest.importorskip("hf_seqkv.kernels.triton_attend", reason="triton is not installed")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

DEVICE = "cuda"
OPTIONS = {"residual_length": 8}  # pages of 64, which the kernels read
FINE = OPTIONS | {"key_bits": 8, "value_bits": 8}


def on_gpu(name, dtype=torch.float32):
    return copy.deepcopy(tiny(name)).to(DEVICE, dtype)


def generated(model, options, pads=(0, 30), tokens=170, **more):
    ids, mask = (x.to(DEVICE) for x in prompt(len(pads), tokens, pads))
    cache = SeqKVCache(config=model.config, **options)
    asked = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": 70} | more
    return model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **asked), cache


def assert_same(mine, other):
    assert torch.equal(mine.sequences, other.sequences)
    assert all(torch.equal(x, y) for x, y in zip(mine.logits, other.logits, strict=True))


def assert_same_state(mine, other):
    (tensors, _), (others, _) = state_of(mine), state_of(other)
    assert tensors.keys() == others.keys()
    for name, x in tensors.items():
        assert torch.equal(x.cpu(), others[name].cpu()), name


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_near_the_specification(name):
    """The same codes, by the kernel and by torch; logits of steps one and three tokens long, pages made between."""
    model, ids = on_gpu(name), prompt(1, 260)[0].to(DEVICE)
    found = []
    with torch.no_grad():
        for backend in ("triton", "reference"):
            cache = SeqKVCache(config=model.config, backend=backend, **FINE)
            steps = ids.split([170, *[1, 3] * 20, *[1] * 10], 1)
            found.append(torch.cat([model(step, **{CACHE_NAME: cache}).logits for step in steps], 1))
    mine, theirs = found
    assert (mine - theirs).abs().max() < 0.03 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_generates(dtype):
    out, cache = generated(on_gpu("llama", dtype), FINE)
    assert out.sequences.shape == (2, 240)
    assert torch.cat(out.logits).isfinite().all()
    assert min(cache.layers[0].counts) > 1


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 5, "pads": (0,)}, {}], ids=str)
def test_modes_are_deterministic(more):
    model = on_gpu("llama")
    first, cache = generated(model, OPTIONS, **more)
    second, other = generated(model, OPTIONS, **more)
    assert_same(first, second)
    assert_same_state(cache, other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait_for_the_gpu():
    """Between pages, whose numbers are looked at, nothing makes Python wait."""
    model, ids = on_gpu("llama"), prompt(2, 180)[0].to(DEVICE)
    cache = SeqKVCache(config=model.config, **OPTIONS)
    with torch.no_grad():
        for step in ids[:, :172].split([160, *[1] * 12], 1):
            model(step, **{CACHE_NAME: cache})
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in ids[:, 172:].split(1, 1):
                model(step, **{CACHE_NAME: cache})
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_is_what_is_said():
    model, ids = on_gpu("llama", torch.bfloat16), torch.full((4, 8000), 7, device=DEVICE)
    with torch.no_grad():
        model(ids[:, :200])  # cuBLAS's workspace
        cache = SeqKVCache(config=model.config, **OPTIONS)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        model(ids, **{CACHE_NAME: cache}, logits_to_keep=1)
        torch.cuda.synchronize()
    held, said = torch.cuda.memory_allocated() - before, cache.memory()["total"]
    assert 0.95 * said < held < 1.05 * said + 2**21


@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 64}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_offloaded_pages(name, more):
    """Copies on a side stream, from pinned memory, beside the computation: the same bits."""
    model = on_gpu(name)
    wanted, plain = generated(model, OPTIONS | {"cuda_graphs": False}, **more)
    found, cache = generated(model, OPTIONS | {"offload": True}, **more)
    assert cache.layers[0].pages.device.type == "cpu"
    assert cache.layers[0].pages.is_pinned()
    assert_same(found, wanted)
    assert_same_state(cache, plain)


def test_sessions_move_to_the_cpu_and_back(tmp_path):
    model = on_gpu("llama")
    _, cache = generated(model, OPTIONS)
    cache.save(tmp_path / "gpu")
    there = SeqKVCache.load(tmp_path / "gpu", tiny("llama"))
    assert there.layers[0].device.type == "cpu"
    assert_same_state(there, cache)
    there.save(tmp_path / "cpu")
    back = SeqKVCache.load(tmp_path / "cpu", model)
    assert back.layers[0].device.type == DEVICE
    assert_same_state(back, cache)
    step = torch.tensor([[5], [7]], device=DEVICE)
    with torch.no_grad():
        assert torch.equal(*(model(step, **{CACHE_NAME: x}).logits for x in (cache, back)))


@pytest.mark.parametrize("form", ["hot", "exact"])
def test_a_prefix_is_loaded(form, tmp_path):
    model, found = on_gpu("llama"), []
    with PrefixStore(tmp_path / "store", form=form) as store:
        store.note_rate = lambda *args, **options: None  # a tiny model's prefill is faster
        for _ in range(2):
            found.append(generated(model, OPTIONS | {"prefix_store": store}, (0,)))
            store.flush()
    assert [cache.prefixes.loaded > 0 for _, cache in found] == [False, True]
    count = found[1][1].prefixes.loaded // 64  # later pages are of another prefill
    assert count > 0
    for mine, theirs in zip(*(cache.layers for _, cache in found), strict=True):
        assert torch.equal(mine.pages[0, :count], theirs.pages[0, :count])


def test_a_captured_attention_replays():
    """A CUDA graph of one attention reads what the buffers hold when it is replayed."""
    arguments = build(Case(page_size=64, counts=(3, 2), half=32, steps=2))
    query, view, _, scoring = (on_device(x, torch.device(DEVICE)) for x in arguments)
    eager = triton_attend.attend_codes(query, view, None, scoring)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_attend.attend_codes(query, view, None, scoring)
    graph.replay()
    assert torch.equal(out, eager)
    view.pages[0, :2] = view.pages[0, :2].flip(0)
    graph.replay()
    assert torch.equal(out, triton_attend.attend_codes(query, view, None, scoring))
    assert not torch.equal(out, eager)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_model_generates_the_same():
    wanted, _ = generated(on_gpu("llama"), FINE, (0,))
    model = on_gpu("llama")
    model.forward = torch.compile(model.forward, backend="aot_eager")
    found, _ = generated(model, FINE, (0,))
    assert torch.equal(found.sequences, wanted.sequences)


@pytest.fixture
def replays(monkeypatch):
    """Steps that were replayed."""
    found, step = [], StepGraph.step
    monkeypatch.setattr(StepGraph, "step", lambda self, given: (found.append(given), step(self, given))[1])
    return found


def assert_near(mine, other):
    for x, y in zip(mine.logits, other.logits, strict=True):
        assert (x - y).abs().max() < 1e-3 * y.abs().max()
    assert torch.equal(mine.sequences, other.sequences)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pads", [(0,), (0, 5, 40)], ids=str)
def test_replayed_steps_are_those_of_the_forward(name, pads, replays):
    model = on_gpu(name)
    out, cache = generated(model, FINE, pads, max_new_tokens=150)
    assert len(replays) > 100
    replays.clear()
    wanted, plain = generated(model, FINE | {"cuda_graphs": False}, pads, max_new_tokens=150)
    assert not replays
    assert_near(out, wanted)
    assert [x.counts for x in cache.layers] == [x.counts for x in plain.layers]


@pytest.mark.filterwarnings("ignore:<memory> was made with other weights")  # in fp32
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_replayed_steps_in_half_precision_with_held_tokens(dtype, replays):
    model = on_gpu("llama", dtype)
    options = {"calibration": holding("llama", by_content), "residual_length": 8}
    out, cache = generated(model, options, max_new_tokens=150)
    assert len(replays) > 60
    assert max(cache.layers[0].held.counts) > 0
    wanted, _ = generated(model, options | {"cuda_graphs": False}, max_new_tokens=150)
    assert torch.equal(out.sequences[:, :200], wanted.sequences[:, :200])


def test_sampling_is_replayed(replays):
    model, found = on_gpu("llama"), []
    for graphs in (True, False):
        torch.manual_seed(3)
        options = FINE | {"cuda_graphs": graphs}
        found.append(generated(model, options, do_sample=True, temperature=0.1)[0].sequences)
    assert len(replays) > 40
    assert torch.equal(*found)


def test_a_forward_that_waits_for_the_gpu_is_refused(replays):
    """The recording fails, the warning says so, and everything works as before."""
    model = on_gpu("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    def waiting(x):
        return forward(x) if x.sum().item() < 1e9 else x

    with mock.patch.object(mlp, "forward", waiting), mock.patch.object(graphed_steps, "_SAID", set()):
        with pytest.warns(SeqKVWarning, match="steps of LlamaForCausalLM are not replayed as CUDA graphs"):
            out, _ = generated(model, FINE)
        assert not replays
    wanted, _ = generated(model, FINE)
    assert len(replays) > 40
    assert_near(out, wanted)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_a_replayed_step_copies_little():
    """Beside the graph, Python starts few kernels and waits for none."""
    model = on_gpu("llama", torch.bfloat16)
    cache = SeqKVCache(config=model.config, **OPTIONS)
    ids = prompt(1, 200)[0].to(DEVICE)
    cache.expected_length = 1000
    steps = graphed_steps.Steps(model, cache)
    with torch.no_grad():
        model(ids[:, :180], **{CACHE_NAME: cache})
        for i in range(180, 190):
            steps(input_ids=ids[:, i : i + 1], position_ids=torch.tensor([[i]], device=DEVICE), **{CACHE_NAME: cache})
        position = torch.tensor([[190]], device=DEVICE)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            steps(input_ids=ids[:, 190:191], position_ids=position, **{CACHE_NAME: cache})
    calls = {event.key: event.count for event in found.key_averages()}
    assert calls["cudaGraphLaunch"] == 1
    assert calls.get("cudaLaunchKernel", 0) < 20
    assert "cudaStreamSynchronize" not in calls
