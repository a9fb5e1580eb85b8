"""`SeqKVConfig`: every rule, and messages that name the value and the way out."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv import SeqKVConfig
from hf_seqkv.config import BACKENDS, BITS, DATA_FREE
from hf_seqkv.errors import ConfigError, SeqKVError

windows = {
    "page_size": st.integers(1, 128).map(lambda n: 8 * n),
    "n_sink": st.integers(0, 1000),
    "residual_length": st.integers(1, 1000),
    "backend": st.sampled_from(BACKENDS),
}
data_free = {
    "key_bits": st.sampled_from(BITS),
    "value_bits": st.sampled_from(BITS),
    "rotation": st.sampled_from(["hadamard", "orthogonal"]),
    "codebook": st.sampled_from(["lloyd_max", "uniform"]),
    "scale": st.sampled_from(["fit", "norm"]),
    "center_keys": st.booleans(),
    "seed": st.integers(0, 2**63),
}
options = st.one_of(
    st.fixed_dictionaries({"method": st.just("dense")}, optional=windows),
    st.fixed_dictionaries({"method": st.just("turboquant")}, optional={**windows, **data_free}),
    st.fixed_dictionaries({}, optional={**windows, **data_free}),
    st.fixed_dictionaries({"calibration": st.text(min_size=1)}, optional=windows),
)


@given(options)
def test_json_round_trip(drawn):
    config = SeqKVConfig(**drawn)
    assert SeqKVConfig.from_json(config.to_json()) == config
    assert SeqKVConfig.from_dict(config.to_dict()) == config
    assert {name: getattr(config, name) for name in drawn} == drawn
    assert json.loads(config.to_json()) == config.to_dict()


def test_json_is_canonical():
    first = SeqKVConfig.from_dict({"page_size": 32, "key_bits": 3}).to_json()
    assert first == SeqKVConfig.from_dict({"key_bits": 3, "page_size": 32}).to_json()
    assert list(json.loads(first)) == sorted(json.loads(first))


def test_calibration_object_is_named_by_its_source():
    class Calibration:
        source = "someone/some-calibration"

    assert SeqKVConfig(calibration=Calibration()).to_dict()["calibration"] == "someone/some-calibration"


def test_defaults():
    config = SeqKVConfig()
    assert config.method == "turboquant"
    assert {name: getattr(config, name) for name in DATA_FREE} == DATA_FREE
    assert (config.page_size, config.n_sink, config.residual_length, config.backend) == (64, 4, 32, "auto")


def test_method_is_inferred_from_the_calibration():
    config = SeqKVConfig(calibration="someone/some-calibration")
    assert config.method == "calibrated"
    # A calibration brings its own: nothing of the data-free method is set.
    assert all(getattr(config, name) is None for name in DATA_FREE)
    assert all(getattr(SeqKVConfig(method="dense"), name) is None for name in DATA_FREE)


def test_config_is_a_value():
    assert hash(SeqKVConfig()) == hash(SeqKVConfig(method="turboquant"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SeqKVConfig().page_size = 8


@pytest.mark.parametrize("bits", BITS)
def test_published_turboquant(bits):
    config = SeqKVConfig.published_turboquant(bits, page_size=128, n_sink=0)
    assert config == SeqKVConfig(
        method="turboquant",
        key_bits=bits,
        value_bits=bits,
        rotation="orthogonal",
        codebook="lloyd_max",
        scale="norm",
        scale_bits=16,
        center_keys=False,
        page_size=128,
        n_sink=0,
    )


LISTED = ", ".join(map(str, BITS))
REFUSED = {
    "method unknown": ({"method": "turbo"}, ["'turbo'", "'dense', 'turboquant', 'calibrated'"]),
    "method unknown beside bits": (
        {"method": "turbo", "key_bits": 4},
        ["'turbo'", "'dense', 'turboquant', 'calibrated'"],
    ),
    "backend unknown": ({"backend": "cuda"}, ["'cuda'", "'auto', 'reference', 'cpu'"]),
    "rotation unknown": ({"rotation": "dct"}, ["'dct'", "'hadamard', 'orthogonal'"]),
    "codebook unknown": ({"codebook": "nf4"}, ["'nf4'", "'lloyd_max', 'uniform'"]),
    "scale bits": ({"scale_bits": 12}, ["scale_bits=12", "8, 16"]),
    "scale bits of another type": ({"scale_bits": 8.0}, ["scale_bits=8.0", "8, 16"]),
    "scale unknown": ({"scale": "max"}, ["'max'", "'fit', 'norm'"]),
    "choice of another type": ({"rotation": 3}, ["rotation=3", "'hadamard'"]),
    "key bits": ({"key_bits": 9}, ["key_bits=9", LISTED]),
    "value bits": ({"value_bits": 0}, ["value_bits=0", LISTED]),
    "bits as text": ({"key_bits": "4"}, ["key_bits='4'", LISTED]),
    "bits as float": ({"key_bits": 4.0}, ["key_bits=4.0", LISTED]),
    "bits as bool": ({"value_bits": True}, ["value_bits=True", LISTED]),
    "center_keys": ({"center_keys": 1}, ["center_keys=1", "True or False"]),
    "page size of 7": ({"page_size": 7}, ["page_size=7", "at least 8"]),
    "page size of 20": ({"page_size": 20}, ["page_size=20", "multiple of 8", "16 or 24"]),
    "page size of 1025": ({"page_size": 1025}, ["page_size=1025", "1024"]),
    "page size of 2048": ({"page_size": 2048}, ["page_size=2048", "up to 1024", "nearest: 1024"]),
    "page size as float": ({"page_size": 64.0}, ["page_size=64.0", "an integer"]),
    "page size of None": ({"page_size": None}, ["page_size=None", "an integer"]),
    "n_sink": ({"n_sink": -1}, ["n_sink=-1", "at least 0"]),
    "n_sink as bool": ({"n_sink": True}, ["n_sink=True", "an integer"]),
    "residual_length": ({"residual_length": 0}, ["residual_length=0", "at least 1"]),
    "seed": ({"seed": -1}, ["seed=-1", "at least 0"]),
    "seed as text": ({"seed": "0"}, ["seed='0'", "an integer"]),
    "calibrated without one": ({"method": "calibrated"}, ["calibration=", "seqkv calibrate", "method='turboquant'"]),
    "calibration and dense": ({"method": "dense", "calibration": "a/b"}, ["method='dense'", "leave one"]),
    "calibration and turboquant": (
        {"method": "turboquant", "calibration": "a/b"},
        ["method='turboquant'", "leave one"],
    ),
    "bits of dense": ({"method": "dense", "key_bits": 4}, ["key_bits=4", "method='dense'", "leave it out"]),
    "seed of calibrated": ({"calibration": "a/b", "seed": 0}, ["seed=0", "method='calibrated'", "leave it out"]),
    "center_keys of dense": ({"method": "dense", "center_keys": False}, ["center_keys=False", "leave it out"]),
}


@pytest.mark.parametrize(("drawn", "said"), REFUSED.values(), ids=REFUSED)
def test_refused(drawn, said):
    with pytest.raises(ConfigError) as error:
        SeqKVConfig(**drawn)
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("other", [{"method": "dense"}, {"calibration": "a/b"}], ids=["dense", "calibrated"])
def test_data_free_options_are_refused_by_other_methods(name, other):
    with pytest.raises(ConfigError, match=f"{name}=.*no meaning"):
        SeqKVConfig(**other, **{name: DATA_FREE[name]})


@pytest.mark.parametrize(
    ("name", "close"),
    [("pagesize", "page_size"), ("key_bit", "key_bits"), ("n_sinks", "n_sink"), ("residual", "residual_length")],
)
def test_unknown_option_is_suggested(name, close):
    with pytest.raises(ConfigError, match=f"'{name}'; did you mean '{close}'"):
        SeqKVConfig.from_dict({name: 8})


def test_unknown_option_without_a_likeness_lists_all():
    with pytest.raises(ConfigError) as error:
        SeqKVConfig.from_dict({"zzz": 1})
    assert "did you mean" not in str(error.value)
    assert all(field.name in str(error.value) for field in dataclasses.fields(SeqKVConfig))


@pytest.mark.parametrize("text", ["[]", "3", '"page_size"'])
def test_json_that_is_no_dict_of_options(text):
    with pytest.raises(ConfigError):
        SeqKVConfig.from_json(text)


def test_error_is_ours_and_a_value_error():
    assert issubclass(ConfigError, SeqKVError)
    assert issubclass(ConfigError, ValueError)
