"""Which transformers is accepted: features decide, numbers warn, and every place that names a range agrees."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from models import tiny
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import AttentionInterface

from hf_seqkv.errors import SeqKVWarning, UnsupportedVersionError
from hf_seqkv.integration import compat, generate

ROOT = Path(__file__).parent.parent
RANGE = f"transformers>={compat.LOWEST},<{compat._after(compat.NEWEST)}"


def test_package_and_range_agree():
    assert f'"{RANGE}",' in (ROOT / "pyproject.toml").read_text()
    assert compat.LOWEST in compat.__doc__
    assert compat.NEWEST in compat.__doc__
    pinned = re.search(r"transformers==(\d+\.\d+)\.\d+", (ROOT / ".ci" / "constraints.txt").read_text())
    assert pinned[1] == compat.NEWEST


def test_installed_version_has_everything():
    assert compat.missing() == []


@pytest.mark.parametrize(
    ("version", "age"),
    [("5.20.2", "older"), ("4.57.6", "older"), ("5.21.0", ""), ("5.24.7", ""), ("5.25.0.dev0", "newer")],
)
def test_versions(version, age):
    assert compat.untested(version) == age


@pytest.mark.parametrize(("version", "age"), [("5.17.0", "older"), ("5.99.0", "newer")])
def test_untested_versions_are_told(monkeypatch, version, age):
    monkeypatch.setattr(compat.transformers, "__version__", version)
    with pytest.warns(SeqKVWarning, match=f"this transformers is {age} .*{version}.*pip install") as told:
        compat.check.__wrapped__()
    assert len(told) == 1


def test_missing_seams_are_named(monkeypatch):
    monkeypatch.delattr(generate.owner_of("_prefill"), "_prefill")
    monkeypatch.setattr(DynamicLayer, "crop", lambda self, max_length: None)  # as up to 5.14
    monkeypatch.setitem(sys.modules, "transformers.modeling_outputs", None)
    expected = r"_prefill, transformers\.modeling_outputs, DynamicLayer\.crop\(tokens_to_remove=\), which.* pip install"
    with pytest.raises(UnsupportedVersionError, match=expected):
        compat.check.__wrapped__()


def test_import_beside_another_version_is_one_clear_error():
    """As in an environment whose transformers was changed afterwards."""
    code = """
import hf_seqkv
import transformers.cache_utils
del transformers.cache_utils.DynamicSlidingWindowLayer
for _ in range(2):
    try:
        from transformers import LlamaForCausalLM
    except ImportError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = rf"UnsupportedVersionError transformers {transformers.__version__} has no DynamicSlidingWindowLayer, which"
    assert [bool(re.match(said, line)) for line in done.stdout.splitlines()] == [True, True], done.stdout


def test_wrapped_functions_keep_their_signatures():
    for name in generate._PATCHES:
        method = getattr(GenerationMixin, name)
        assert inspect.signature(method) == inspect.signature(method.seqkv_original)
    for name in ("sdpa", "flash_attention_2", "flex_attention"):
        function = AttentionInterface._global_mapping[name]
        assert inspect.signature(function) == inspect.signature(function.original)


def test_unknown_arguments_pass(monkeypatch):
    """A parameter that a later transformers adds reaches the function it is for."""
    seen = {}

    def attention(module, query, key, value, attention_mask, *, invented=None, **kwargs):
        seen["attention"] = invented
        return query.transpose(1, 2), None

    from hf_seqkv.integration.attention import _wrap

    query = torch.zeros(1, 1, 1, 8)
    _wrap(attention)(None, query, query, query, None, invented=3)

    def prepare(self, generation_config, model_kwargs, *args, invented=None):
        seen["prepare"] = args, invented

    config = transformers.GenerationConfig()
    generate._prepare(prepare)(tiny("llama"), config, {}, 1, 2, invented=4)
    assert seen == {"attention": 3, "prepare": ((1, 2), 4)}
