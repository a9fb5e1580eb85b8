"""The operator that `torch.compile` sees."""

import pytest
import torch
from kernel_cases import CASES, build
from models import prompt, tiny

from hf_seqkv import SeqKVCache
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.kernels import ops, reference

NAMES = ["plain", "everything", "side table, page of 64, center"]


@pytest.mark.parametrize("name", NAMES)
def test_operator_is_the_function(name):
    query, view, mask, scoring = build(CASES[name])
    out = ops.attend_codes(query, *ops.flatten(view, mask, scoring), "reference")
    assert torch.equal(out, reference.attend_codes(query, view, mask, scoring))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_operator_keeps_torchs_rules(name):
    query, view, mask, scoring = build(CASES[name])
    if mask is not None:
        mask = mask.nan_to_num()
    torch.library.opcheck(
        torch.ops.hf_seqkv.attend_codes.default,
        (query, *ops.flatten(view, mask, scoring), "auto"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.filterwarnings("ignore")
def test_no_graph_break_at_the_operator():
    query, view, mask, scoring = build(CASES["plain"])
    weight = torch.randn(64, 64)

    def step(query, *arguments):
        return torch.relu(ops.attend_codes(query @ weight, *arguments, "auto")) @ weight

    arguments = ops.flatten(view, mask, scoring)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(query, *arguments), step(query, *arguments), atol=1e-5)


def test_a_codec_that_is_gone_is_not_found():
    query, view, mask, scoring = build(CASES["plain"])
    arguments = list(ops.flatten(view, mask, scoring))
    arguments[0] = 1
    with pytest.raises(KeyError):
        ops.attend_codes(query, *arguments, "reference")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_breaks_at_the_caches_bookkeeping_only():
    model, ids = tiny("llama"), prompt(1, 60)[0]
    plain, compiled = (SeqKVCache(config=model.config, page_size=8, residual_length=8) for _ in range(2))
    with torch.no_grad():
        for cache in (plain, compiled):
            model(ids, **{CACHE_NAME: cache})
        seen = torch._dynamo.explain(lambda x: model(x, **{CACHE_NAME: compiled}).logits)(ids[:, :1])
        model(ids[:, :1], **{CACHE_NAME: plain})
        targets = [str(node.target) for graph in seen.graphs for node in graph.graph.nodes]
        assert "hf_seqkv.attend_codes.default" in targets
        assert all("SeqKVLayer.update" in reason.reason for reason in seen.break_reasons)
        step = torch.compile(lambda x, cache: model(x, **{CACHE_NAME: cache}).logits, backend="eager")
        for at in range(12):
            x = ids[:, at : at + 1]
            assert torch.equal(step(x, compiled), model(x, **{CACHE_NAME: plain}).logits)
