"""`bench quality`: every method on every text, windows, refusals, calibrations, and the command."""

import json
import math

import pytest
import torch
from models import tiny

from hf_seqkv import calibrate
from hf_seqkv.calibration.overlap import TENSOR, shingles
from hf_seqkv.cli import main
from hf_seqkv.cli.options import load_model
from hf_seqkv.errors import CalibrationNotFoundError, ConfigError
from hf_seqkv.eval import passages, quality, smollm2


class Words:
    """Tokenizer of numbers."""

    bos_token_id = 1

    def __call__(self, text, **options):
        return {"input_ids": [int(word) % 128 + 3 for word in text.split()]}


def numbers(seed: int, count: int) -> str:
    drawn = torch.randint(1000, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(map(str, drawn.tolist()))


TEXTS = {"first": numbers(1, 2000), "second": numbers(2, 1500)}
PLAN = quality.Plan(windows=2, window=120, prefill=40, residual_length=8, page_size=8)


@pytest.fixture(scope="module")
def measured():
    methods = quality.METHODS | {"lossless": quality.seqkv(method="dense")}
    return quality.measure(tiny("llama"), Words(), TEXTS, methods, PLAN, progress=False)


def test_lossless_is_dense(measured):
    for rows in (*measured["texts"].values(), measured["all"]):
        row = rows["lossless"]
        assert row["kl"] == pytest.approx(0, abs=1e-6)
        assert row["ratio"] == pytest.approx(1, abs=1e-5)
        assert row["top1"] == 1
        assert row["bits_per_value"] == 32


def test_every_method_is_measured(measured):
    """On every token of every text, with its bits and the same dense tokens beside."""
    assert list(measured["texts"]) == list(TEXTS)
    assert (measured["plan"]["window"], measured["notes"]) == (120, [])
    assert measured["dense_bytes"] == 3 * 2 * 119 * 2 * 16 * 4  # layers, sides, tokens, heads, head dim, fp32
    for rows, tokens in (*((rows, 160) for rows in measured["texts"].values()), (measured["all"], 320)):
        assert list(rows) == [*quality.METHODS, "lossless"]
        for row in rows.values():
            assert row["tokens"] == tokens
            assert row["memory"]["sinks"] == 3 * 2 * 4 * 2 * 16 * 4
            assert row["memory"]["recent"] == rows["default"]["memory"]["recent"]
            assert row["dense_perplexity"] == rows["default"]["dense_perplexity"]
    for name, bits in {"turboquant-2": 3, "turboquant-4": 5, "kivi-2": 5, "kivi-4": 7, "int4": 6}.items():
        assert measured["all"][name]["bits_per_value"] == bits  # 16 components and 8 tokens are small groups
    kl = {name: row["kl"] for name, row in measured["all"].items()}
    assert kl["turboquant-2"] > kl["turboquant-3"] > kl["turboquant-4"] > 0
    assert kl["kivi-2"] > kl["kivi-4"] > 0


def test_all_pools_the_texts(measured):
    for name, row in measured["all"].items():
        texts = [rows[name] for rows in measured["texts"].values()]
        assert row["kl"] == pytest.approx(sum(text["kl"] for text in texts) / 2)
        assert row["top1"] == pytest.approx(sum(text["top1"] for text in texts) / 2)
        assert row["ratio"] == pytest.approx(math.prod(text["ratio"] for text in texts) ** 0.5)


# -- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "tokens"), [(1, 100), (3, 100), (5, 100), (3, 97), (10, 90)])
def test_windows_are_apart_and_spread(count, tokens):
    rows = quality.cut("text", list(range(tokens)), [-1], count, 10)
    assert rows.shape == (count, 10)
    assert rows[:, 0].tolist() == [-1] * count
    body = rows[:, 1:]
    assert (body.diff() == 1).all()
    assert (body[1:, 0] > body[:-1, -1]).all()
    middles = body.double().mean(1)
    expected = (torch.arange(count) + 0.5) * tokens / count
    assert (middles - expected).abs().max() <= 1.5


def test_texts_that_are_too_short():
    with pytest.raises(ConfigError, match="novel has 89 tokens, 10 windows need 90; give a longer text"):
        quality.cut("novel", list(range(89)), [1], 10, 10)


def test_windows_beyond_the_model():
    with pytest.raises(ConfigError, match="windows of 513 tokens exceed the model's 512"):
        quality.measure(tiny("llama"), Words(), TEXTS, quality.METHODS, quality.Plan(window=513), progress=False)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"prefill": 2047}, "2047 tokens leaves less than 2"),
        ({"prefill": 0}, "prefill of 0"),
        ({"window": 132, "prefill": 10}, "holds no page: 4 sinks, 64 recent .* need 133"),
        ({"n_sink": -1}, "n_sink=-1"),
    ],
)
def test_plans_that_cannot_be(plan, words):
    with pytest.raises(ConfigError, match=words):
        quality.Plan(**plan)


def test_dense_tokens_are_the_same_for_all():
    with pytest.raises(ConfigError, match="n_sink, residual_length: the same for every method"):
        quality.seqkv(residual_length=128, n_sink=8, key_bits=4)


# -- calibrations ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration():
    made = calibrate(tiny("llama"), Words(), [TEXTS["first"]], tokens=1024, window=128, sequence=False, progress=False)
    made.tensors[TENSOR] = shingles(Words()(TEXTS["first"])["input_ids"])
    return made


def judged(calibration, texts: dict[str, str]) -> dict:
    methods = {"default": quality.seqkv(), "mine": quality.seqkv(calibration=calibration)}
    return quality.measure(tiny("llama"), Words(), texts, methods, PLAN, progress=False)


def test_calibration_is_measured_on_other_texts(calibration):
    result = judged(calibration, {"second": TEXTS["second"]})
    assert result["notes"] == []
    assert result["all"]["mine"]["kl"] < result["all"]["default"]["kl"]


def test_calibration_texts_are_refused(calibration):
    with pytest.raises(ConfigError, match=r"mine: calibration of llama was fitted on 100\.0% of novel .* at most 1%"):
        judged(calibration, {"novel": TEXTS["first"]})


def test_a_passage_in_a_window_is_refused(calibration):
    """A small part of the text, all of one of its windows."""
    words = numbers(3, 30_000).split()
    words[7440:7560] = TEXTS["first"].split()[200:320]
    ids = Words()(" ".join(words))["input_ids"]
    assert torch.isin(shingles(ids), calibration.tensors[TENSOR]).double().mean() < 0.01
    with pytest.raises(ConfigError, match="was fitted on"):
        judged(calibration, {"other": " ".join(words)})


def test_calibration_that_does_not_say(calibration):
    known = calibration.tensors.pop(TENSOR)
    try:
        result = judged(calibration, TEXTS)
    finally:
        calibration.tensors[TENSOR] = known
    assert result["notes"] == [
        "mine: calibration of llama does not say what it was fitted on; it may have seen these texts"
    ]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.setattr(smollm2, "load", lambda dtype: (tiny("llama").to(dtype), Words(), "tiny"))
    monkeypatch.setattr(passages, "read", lambda name: TEXTS["first" if name == "jargon_file" else "second"])


SIZES = ["--windows", "1", "--window", "220", "--prefill", "50"]


def test_command(demo, tmp_path, calibration, capsys):
    where, text = calibration.save_pretrained(tmp_path / "made"), tmp_path / "novel.txt"
    text.write_text(TEXTS["second"])
    argv = ["--texts", str(text), "--methods", "kivi-2", "--method", "mine:key_bits=4,value_bits=3,scale=norm"]
    argv += ["--calibration", str(where), "--calibration", f"again={where}"]
    assert main(["bench", "quality", *SIZES, *argv, "--plot", str(tmp_path / "q.png"), "--json"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    result = json.loads(shown.out)
    assert (result["model"], result["dtype"]) == ("tiny", "float32")
    assert result["command"].startswith("seqkv bench quality --windows 1")
    assert result["plan"] == {
        "windows": 1, "window": 220, "prefill": 50, "n_sink": 4, "residual_length": 64, "page_size": 64,
    }  # fmt: skip
    (rows,) = result["texts"].values()
    assert rows == result["all"]
    assert list(rows) == ["kivi-2", "mine", "hot", "again"]
    assert rows["hot"] == rows["again"] != rows["mine"]
    assert rows["mine"]["tokens"] == 170
    for words in (f"{text}: 170 tokens", f"{rows['hot']['kl']:.5f} ± {rows['hot']['kl_error']:.5f}", "last 64 to 127"):
        assert words in shown.err
    assert "all: " not in shown.err  # of one text
    assert (tmp_path / "q.png").stat().st_size > 0


def test_default_texts_and_methods(demo, capsys):
    assert main(["bench", "quality", *SIZES, "--residual-length", "32", "--n-sink", "0", "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert list(result["texts"]) == ["jargon_file", "king_james"]
    assert list(result["all"]) == list(quality.METHODS)
    assert result["plan"]["residual_length"] == 32
    assert result["all"]["int4"]["memory"]["sinks"] == 0
    assert "all: 340 tokens" in shown.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--methods", "kivi-3"], "--methods kivi-3: not one of turboquant-2, "),
        (["--methods"], "methods (none): give at least one"),
        (["--method", "int4:key_bits=4"], "each name once"),
        (["--method", "x:page_size=8"], "page_size: the same for every method"),
        (["--method", "x:keybits=4"], "did you mean 'key_bits'"),
        (["--texts", "no/such/file.txt"], "--texts: "),
        (["--plot", "no/such/directory/q.png"], "no such directory"),
        (["--model", "no/such/model"], "cannot load no/such/model"),
    ],
)
def test_command_errors(argv, words, capsys):
    assert main(["bench", "quality", *argv]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--windows", "0"], ["--method", "key_bits=4"], ["--method", "x:key_bits"]])
def test_command_usage(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "quality", *argv])
    assert stopped.value.code == 2


def test_models_of_a_directory(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name, **options: (name, options))
    model, tokenizer, description = load_model(str(tmp_path), None, "bfloat16")
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    assert tokenizer == (str(tmp_path), {})
    assert description == str(tmp_path)


def test_missing_calibration(tmp_path):
    with pytest.raises(CalibrationNotFoundError):
        quality.seqkv(calibration=tmp_path)


# -- a real model ------------------------------------------------------------------------------------------------------


def test_more_bits_are_closer_on_a_real_model():
    model, tokenizer, _ = smollm2.load()
    names = ("turboquant-2", "turboquant-3", "turboquant-4", "kivi-2", "kivi-4")
    plan = quality.Plan(windows=1, window=384)
    methods = {name: quality.METHODS[name] for name in names}
    texts = {"king_james": passages.read("king_james")}
    rows = quality.measure(model, tokenizer, texts, methods, plan, progress=False)["all"]
    assert [rows[name]["bits_per_value"] for name in names] == [2.25, 3.25, 4.25, 3, 5]
    kl = {name: row["kl"] for name, row in rows.items()}
    assert kl["turboquant-4"] < kl["turboquant-3"] / 2 < kl["turboquant-2"] / 4
    assert 0 < kl["kivi-4"] < kl["kivi-2"] / 4
    assert all(row["kl_error"] < row["kl"] for row in rows.values())
