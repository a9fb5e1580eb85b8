"""Files of a calibration: they come back, damage is refused by name, and the Hub's conventions are kept."""

import json
import re
import shutil

import pytest
import torch
from models import SMALL, prompt, tiny
from test_calibration import make

from hf_seqkv import SeqKVCalibration
from hf_seqkv.calibration.artifact import CONFIG_NAME, TENSORS_NAME
from hf_seqkv.errors import CalibrationMismatchError, CalibrationNotFoundError, FormatError
from hf_seqkv.eval.card import render_card


@pytest.fixture(scope="module")
def llama():
    return make()


@pytest.fixture(scope="module")
def complete():
    return make(tokens=792, window=264, sequence=True)


@pytest.fixture
def saved(llama, tmp_path):
    return llama.save_pretrained(tmp_path / "calibration")


def test_round_trip(llama, saved):
    loaded = SeqKVCalibration.from_pretrained(saved)
    assert loaded.config == llama.config
    assert all(torch.equal(loaded.tensors[name], x) for name, x in llama.tensors.items())
    model, ids = tiny("llama"), prompt(1, 100)[0]
    results = [
        model.generate(
            ids,
            max_new_tokens=20,
            do_sample=False,
            cache_implementation="seqkv",
            cache_config={"calibration": source, **SMALL},
        )
        for source in (llama, str(saved))
    ]
    assert torch.equal(*results)


def test_future_format_is_refused(saved):
    config = json.loads((saved / CONFIG_NAME).read_text())
    (saved / CONFIG_NAME).write_text(json.dumps(config | {"format_version": 5}))
    with pytest.raises(CalibrationMismatchError, match="version 5, this hf_seqkv reads 4"):
        SeqKVCalibration.from_pretrained(saved)


@pytest.mark.parametrize("name", [TENSORS_NAME, CONFIG_NAME])
@pytest.mark.parametrize("size", [0, 10, 500])
def test_truncated_files_are_refused(saved, name, size):
    data = (saved / name).read_bytes()
    assert len(data) > size
    (saved / name).write_bytes(data[:size])
    with pytest.raises(FormatError, match="damaged"):
        SeqKVCalibration.from_pretrained(saved)


def test_missing_parts_are_named(saved, llama):
    (saved / TENSORS_NAME).unlink()
    with pytest.raises(CalibrationNotFoundError, match=TENSORS_NAME):
        SeqKVCalibration.from_pretrained(saved)
    short = SeqKVCalibration({k: v for k, v in llama.tensors.items() if k != "0.key.std"}, llama.config)
    short.save_pretrained(saved)
    with pytest.raises(FormatError, match=r"tensor 0\.key\.std is missing"):
        SeqKVCalibration.from_pretrained(saved)


SHAPED = (
    *("0.key.std", "0.key.rotation", "1.value.widths", "2.key.levels", "1.held"),
    *(f"sequence.full.{name}" for name in ("tables", "along", "0.key.predictor", "2.value.predictor")),
    *(f"sequence.light.1.key.{name}" for name in ("bias", "synthesis", "sizes", "refined", "importance", "share")),
    "sequence.full.2.key.inputs",
)


@pytest.mark.parametrize("name", SHAPED)
def test_tensors_of_another_shape_are_refused(complete, tmp_path, name):
    """One dimension more, or one component less where the size is not the tensor's own."""
    whole = complete.tensors[name]
    damaged = [whole[None], *([] if name.endswith(("std", "levels", "share")) else [whole[..., :-1]])]
    for tensor in damaged:
        SeqKVCalibration(complete.tensors | {name: tensor}, complete.config).save_pretrained(tmp_path)
        with pytest.raises(FormatError, match=rf"tensor {re.escape(name)} has shape .* make the calibration again"):
            SeqKVCalibration.from_pretrained(tmp_path)


def test_inputs_that_are_not_there_are_refused(complete, tmp_path):
    """Values of the layer before, of more components than it has; the keys of the part's own layer, of keys."""
    for name, place in (("2.value", 2), ("1.key", 5)):
        name = f"sequence.full.{name}.inputs"
        inputs = complete.tensors[name].clone()
        inputs[place] += 2
        SeqKVCalibration(complete.tensors | {name: inputs}, complete.config).save_pretrained(tmp_path)
        with pytest.raises(FormatError, match=rf"{re.escape(name)} is .* must be 0 or the whole of"):
            SeqKVCalibration.from_pretrained(tmp_path)


def test_sequence_codec_survives_files(complete, tmp_path):
    loaded = SeqKVCalibration.from_pretrained(complete.save_pretrained(tmp_path))
    for profile, predicts in (("full", True), ("light", False)):
        ours, theirs = (x.sequence_codec(profile) for x in (complete, loaded))
        assert ours.predicts == predicts
        assert ours.fingerprint == theirs.fingerprint
        assert ours.base == theirs.base
        for a, b in zip(ours.parts, theirs.parts, strict=True):
            assert torch.equal(a.importance, b.importance)
    assert complete.sequence_codec("full").fingerprint != complete.sequence_codec("light").fingerprint
    assert complete.sequence_codec("full", 3).step == 3


def test_hub_cache_and_offline(saved, monkeypatch, tmp_path):
    """A repository in the Hub cache loads without a network; one that is not there is an error that says what to do."""
    folder = tmp_path / "hub" / "models--someone--llama-seqkv"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    shutil.copytree(saved, folder / "snapshots" / ("a" * 40))
    options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    assert SeqKVCalibration.from_pretrained("someone/llama-seqkv", **options).config["key_bits"] == 5
    with pytest.raises(CalibrationNotFoundError, match="hf download someone/nothing"):
        SeqKVCalibration.from_pretrained("someone/nothing", **options)
    with pytest.raises(CalibrationNotFoundError, match="neither a directory nor"):
        SeqKVCalibration.from_pretrained("not/a/repository")


def test_push_to_hub(llama, monkeypatch):
    """What is sent, and with which options; the client is replaced, there being no Hub in a test."""
    import huggingface_hub

    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, **options):
            sent["create"] = (repo_id, options)
            return type("Url", (), {"repo_id": f"me/{repo_id}"})()

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
            import os

            sent["upload"] = (repo_id, sorted(os.listdir(folder_path)), revision)
            return "https://example.invalid/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    llama.card = render_card(llama.config)
    try:
        url = llama.push_to_hub("llama-seqkv", private=True, token="secret", revision="v1")
    finally:
        llama.card = None
    assert url == "https://example.invalid/commit"
    assert sent["token"] == "secret"
    assert sent["create"] == ("llama-seqkv", {"private": True, "exist_ok": True})
    assert sent["upload"] == ("me/llama-seqkv", ["README.md", TENSORS_NAME, CONFIG_NAME], "v1")
