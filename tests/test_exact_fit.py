"""Tables of the exact codec as they are fitted: what each predictor gains, in calibrations, in the bench."""

import json

import numpy as np
import pytest
import torch
from exact_cases import make
from models import tiny
from test_calibration import TEXT, Words
from test_calibration import make as calibrated

from hf_seqkv.calibration.artifact import SeqKVCalibration
from hf_seqkv.calibration.exact_fit import Predictors
from hf_seqkv.cli import main
from hf_seqkv.codec import exact_part
from hf_seqkv.codec.exact import ExactCodec
from hf_seqkv.codec.exact_tables import ExactTables
from hf_seqkv.errors import ConfigError, FormatError
from hf_seqkv.eval import bench_exact, passages, smollm2


@pytest.fixture(scope="module")
def calibration():
    return calibrated(tokens=792, window=264, sequence=True)


def size(case, using: Predictors | None) -> int:
    return sum(map(len, case.codec(using).encode(case.payloads(), case.around())))


@pytest.mark.parametrize("name", ["layers", "embedding"])
def test_each_predictor_gains(name):
    case = make(count=40)
    assert size(case, Predictors()) < size(case, Predictors(**{name: False}))


def test_heads_and_components_that_follow_from_others_gain():
    case = make(count=40, noise=0.0)
    for x in (*case.sample.keys, *case.sample.values):
        shared = torch.randn(len(x), 1, x.shape[2], 1, generator=torch.Generator().manual_seed(1))
        x += shared  # what no input tells, the same in all heads and components
    neither, heads, components = (
        size(case, Predictors(heads=h, components=c)) for h, c in ((False, False), (True, False), (False, True))
    )
    assert neither > 1.03 * heads
    assert neither > 1.03 * components


def test_tables_survive_their_tensors():
    tables = make().fit(Predictors(adapts=False))
    again = ExactTables.from_tensors(tables.tensors())
    assert (again.embedded, again.adapts) == (True, False)
    for a, b in zip(again.parts, tables.parts, strict=True):
        assert all(torch.equal(x, b.tensors()[name]) for name, x in a.tensors().items())


def test_embeddings_need_a_codec_that_predicts():
    case = make()
    case.parts = None
    with pytest.raises(ConfigError, match="full"):
        case.fit()
    tables = case.fit(Predictors(embedding=False))
    codec = ExactCodec(case.pages, None, tables)
    stored = codec.encode(case.payloads(), case.around())
    assert torch.equal(codec.decode(stored, case.around())[0], case.payloads()[0])


def test_calibration_has_tables(calibration, tmp_path):
    again = SeqKVCalibration.from_pretrained(calibration.save_pretrained(tmp_path))
    found = [ExactCodec(_pages(x), *x.exact()) for x in (calibration, again)]
    assert found[0].predicts
    assert found[0].fingerprint == found[1].fingerprint
    assert calibrated().exact() == ()
    del again.tensors["exact.1.key.gain"]
    with pytest.raises(FormatError, match=r"1\.key\.gain is missing"):
        again.exact()


def _pages(calibration) -> list:
    return [calibration.page_codec(index, 2, 16, 16, 64) for index in range(3)]


def test_bench(calibration, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "load", lambda dtype: (tiny("llama").to(dtype), Words(), "tiny"))
    monkeypatch.setattr(passages, "read", lambda name: TEXT)
    saved = str(calibration.save_pretrained(tmp_path))
    argv = ["bench", "exact", "--calibration", saved, "--tokens", "300", "--fit-tokens", "528", "--seconds", "1"]
    assert main([*argv, "--gains", "--option", "value_bits=3", "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert [row["name"] for row in result["rows"]] == [bench_exact.ALONE, *bench_exact.GAINS, bench_exact.EVERYTHING]
    first, last = result["rows"][0], result["rows"][-1]
    assert last["bits"] < first["bits"] < result["hot"]
    assert last["decode"]["values_per_second"] > 0
    mean = sum(sum(layer.values()) for layer in last["layers"]) / 6
    assert mean == pytest.approx(last["bits"], rel=0.05)
    assert "+ earlier components" not in shown.err
    assert "M values/s" in shown.err


def test_bench_needs_pages(calibration):
    ids = torch.arange(3, 60)
    with pytest.raises(ConfigError, match="makes no page"):
        bench_exact.measure(tiny("llama"), [ids], ids[None], calibration, {}, False, 1.0)


def test_products_do_not_depend_on_how_torch_multiplies_float32():
    """A program may allow narrower products for its own matrices; these stay whole."""
    generator = np.random.default_rng(0)
    x = generator.integers(-127, 128, (64, 700)).astype(np.float32)
    weights = generator.integers(-80, 81, (700, 48)).astype(np.float32)
    before = torch.get_float32_matmul_precision()
    found = []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            found.append(exact_part.product(x, weights))
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(found[0], x.astype(np.int64) @ weights.astype(np.int64))
    assert np.array_equal(*found)
