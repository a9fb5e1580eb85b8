"""`seqkv bench codec`, `seqkv bench ablation` and `seqkv inspect CALIBRATION`, on a tiny model."""

import json

import pytest
from models import tiny
from test_calibration import TEXT, Words, make

from hf_seqkv.cli import main
from hf_seqkv.errors import ConfigError
from hf_seqkv.eval import ablation, calibration_report, passages, presets, quality, smollm2

OTHER = " ".join(str((7 * i * i + 3 * i) % 127) for i in range(3000))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = make(tokens=792, window=264, sequence=True)
    for profile in made.config["sequence"].values():
        profile["presets"] = {"fine": -4, "balanced": 0, "small": 5}
    return made.save_pretrained(tmp_path_factory.mktemp("calibration"))


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.setattr(smollm2, "load", lambda dtype: (tiny("llama").to(dtype), Words(), "tiny"))
    monkeypatch.setattr(passages, "read", lambda name: OTHER)
    monkeypatch.setattr(passages, "held_out", lambda tokenizer, count: prompt_of(count))


def prompt_of(count):
    import torch

    return torch.tensor([Words()(OTHER)["input_ids"][:count]])


def test_codec_is_timed_and_finer_steps_take_more(demo, saved, capsys):
    argv = ["bench", "codec", "--calibration", str(saved), "--steps", "0", "fine", "--pages", "6", "--tokens", "300"]
    assert main([*argv, "--seconds", "1", "--json"]) == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)["rows"]
    assert [(row["profile"], row["step"]) for row in rows] == [("full", 0), ("full", -4), ("light", 0), ("light", -4)]
    assert rows[1]["bits_per_value"] > rows[0]["bits_per_value"]
    for row in rows:
        assert row["encode"]["values_per_second"] > 0
        assert row["decode"]["values_per_second"] > 0
        # Tables and streams agree on the length, but for headers and escapes, which weigh on a model of random weights.
        parts = sum(part["bits"] for part in row["parts"]) / len(row["parts"])
        assert parts < row["bits_per_value"] < 1.2 * parts + 8 * 150 / (64 * 3 * 64)
        assert [part["side"] for part in row["parts"]] == ["key", "value"] * 3
    assert "decode, M values/s" in shown.err


def test_codec_needs_a_page(demo, saved, capsys):
    assert main(["bench", "codec", "--calibration", str(saved), "--tokens", "40"]) != 0
    assert "holds no page" in capsys.readouterr().err


def test_inspect(saved, tmp_path, capsys):
    assert main(["inspect", str(saved), "--step", "small", "--plot", str(tmp_path / "spectra.png")]) == 0
    shown = capsys.readouterr().out
    assert "full at step small" in shown
    assert (tmp_path / "spectra.png").stat().st_size > 0
    assert main(["inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 6
    assert found["presets"]["light"] == {"fine": -4, "balanced": 0, "small": 5}
    for row in found["layers"]:
        assert sum(row["hot_widths"].values()) == pytest.approx(1)
        assert set(row["rates"]) == set(row["left"]) == set(row["inputs"]) == {"full", "light"}
        assert row["inputs"]["light"] == 0


def test_a_calibration_without_floors_is_shown():
    """One that was fitted when all layers had the same."""
    made = make(tokens=792, window=264, sequence=True)
    floors = {name: of.pop("floor") for name, of in made.config["sequence"].items()}
    found = calibration_report.facts(made, 0)
    assert all(set(row["floor"]) == set(floors) and not any(row["floor"].values()) for row in found["layers"])
    assert " - " in calibration_report.table(found)


def test_predicted_rates_fall_with_the_step():
    made = make(tokens=792, window=264, sequence=True)
    steps = 4, 12, 20  # random weights: at finer ones values escape
    rates = [sum(calibration_report.predicted_rates(made.sequence_codec("light", step))) for step in steps]
    assert rates[0] > rates[1] > rates[2] > 0


def test_inspect_wants_one_thing(capsys):
    with pytest.raises(SystemExit):
        main(["inspect"])


def test_presets_stay_below_their_divergence():
    measured = {-6: 0.0011, 0: 0.0060, 6: 0.0330}  # a factor of 5.5 for six steps
    steps = presets.choose_steps(measured)
    for name, most in presets.PRESETS.items():
        expected = 0.0060 * 5.46 ** (steps[name] / 6)
        assert expected <= most * 1.02
        assert expected * 5.46 ** (1 / 6) > most * 0.98
    assert steps["fine"] < steps["balanced"] < steps["small"]


def test_ablation(monkeypatch):
    monkeypatch.setattr(ablation, "WINDOW", 264)
    names = "everything", ablation.TURNED, "no prediction"
    variants = {name: ablation.VARIANTS[name] for name in names}
    monkeypatch.setattr(ablation, "VARIANTS", variants)
    plan = quality.Plan(windows=1, window=300, prefill=100)
    found = ablation.measure(tiny("llama"), Words(), [TEXT], {"other": OTHER}, 1056, 0, plan)
    assert list(found) == list(variants)
    for one in found.values():
        fine, coarse = one["rows"].values()
        assert fine["bits_per_value"] > coarse["bits_per_value"]
    assert all(name in ablation.table(found) for name in variants)
    rates = {name: [row["bits_per_value"] for row in one["rows"].values()] for name, one in found.items()}
    assert len(set(map(tuple, rates.values()))) == len(variants)
    with pytest.raises(ConfigError, match="was fitted on"):
        ablation.measure(tiny("llama"), Words(), [TEXT], {"same": TEXT}, 1056, 0, plan)
