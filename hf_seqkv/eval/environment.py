"""What a report or a bug needs to know of the machine: versions, processor, kernel, GPUs, directories."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path

from ..errors import SeqKVError, SeqKVWarning

PACKAGES = ("torch", "transformers", "numba", "triton", "numpy")
VARIABLES = ("HF_SEQKV_BACKEND", "HF_SEQKV_CACHE", "HF_SEQKV_SMOLLM2")
# Our name of each feature, and what /proc/cpuinfo calls it on the architectures that may have it.
FEATURES = {name: name for name in ("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx2")} | {"neon": "asimd"}


def describe() -> dict:
    """All of it, as JSON types. Imports torch and the compiled kernel, but no model."""
    import torch

    print("the first time on a machine this compiles the kernel, about 30 s", file=sys.stderr)
    kernel = _kernel()
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.platform(),
            "features": cpu_features(),
        },
        "threads": {"torch": torch.get_num_threads(), "kernel": kernel.pop("threads")},
        "kernel": kernel,
        "auto_backend": {device: _auto_backend(device) for device in ("cpu", "cuda")},
        "devices": _devices(),
        "variables": {name: os.environ.get(name) for name in VARIABLES},
        "directories": {**_directories(), "compiled kernel": kernel.pop("directory")},
    }


def versions() -> dict[str, str]:
    """Of this package and of those it runs on; `"not installed"` for one that is not."""
    from .. import __version__

    found = {"hf_seqkv": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_name() -> str:
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()


def cpu_features() -> dict[str, bool | None]:
    """Which vector instructions the processor has; None where the system does not say (Linux does)."""
    lists = _cpuinfo("flags") or _cpuinfo("Features")
    if lists:
        flags = set(lists[0].split())
        return {name: flag in flags for name, flag in FEATURES.items()}
    arm = platform.machine().lower() in ("arm64", "aarch64")  # NEON is part of the architecture
    return {name: name == "neon" if arm else None for name in FEATURES}


def _cpuinfo(field: str) -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            pairs = (line.partition(":") for line in file)
            return [value.strip() for name, _, value in pairs if name.strip() == field]
    except OSError:
        return []


def _kernel() -> dict:
    """Which way the CPU kernel computes here, its threads, and where numba keeps what it compiled."""
    import torch

    threads = torch.get_num_threads()
    try:
        from ..kernels import cpu
    except ImportError as error:
        return {"path": f"none: {error}; attention uses torch", "threads": None, "directory": None}
    finally:
        torch.set_num_threads(threads)  # numba's OpenMP pool may reset torch's count as it starts
    config, beside = sys.modules["numba"].config, Path(cpu.__file__).parent / "__pycache__"
    return {
        "path": cpu.path(),
        "threads": cpu.thread_count(),
        "directory": config.CACHE_DIR
        or (str(beside) if os.access(beside.parent, os.W_OK) else "numba's own directory"),
    }


def _auto_backend(device: str) -> str:
    """Backend that `"auto"` takes for the default codec on a device, or why none."""
    import torch

    from ..codec.page import QuantizedPageCodec
    from ..codec.vector import VectorCodec
    from ..config import DATA_FREE, SeqKVConfig
    from ..kernels.interface import select_backend

    same = {name: DATA_FREE[name] for name in ("rotation", "codebook", "scale", "seed")}
    sides = (VectorCodec.data_free(1, 64, SeqKVConfig().page_size, bits=bits, **same) for bits in (5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SeqKVWarning)  # that numba is missing is said beside it
        try:
            chosen = select_backend("auto", QuantizedPageCodec(*sides), torch.device(device))
        except SeqKVError as error:
            return f"none: {error}"
    return chosen.name


def _devices() -> list[dict]:
    """CUDA and ROCm devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_bytes": device.total_memory, "runtime": runtime} for device in found]


def _directories() -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from .smollm2 import cache_directory

    return {"downloads": str(cache_directory()), "Hugging Face": str(Path(HF_HUB_CACHE))}


def table(found: dict) -> str:
    """`describe()` for people."""
    machine, threads, kernel = found["machine"], found["threads"], found["kernel"]
    marks = {True: "yes", False: "no", None: "unknown"}
    features = ", ".join(f"{name} {marks[has]}" for name, has in machine["features"].items())
    rows = [
        *found["versions"].items(),
        ("system", machine["system"]),
        ("processor", machine["cpu"]),
        ("cores", f"{machine['cores']}, {machine['usable_cores']} of them usable"),
        ("features", features),
        ("threads", f"torch {threads['torch']}, kernel {threads['kernel'] or 'none'}"),
        ("CPU kernel", kernel["path"]),
        *((f"backend 'auto' on {device}", name) for device, name in found["auto_backend"].items()),
        *(("GPU", f"{d['name']}, {d['memory_bytes'] / 1e9:.0f} GB, {d['runtime']}") for d in found["devices"]),
        *((name, value or "not set") for name, value in found["variables"].items()),
        *((f"{name} in", path or "not kept") for name, path in found["directories"].items()),
    ]
    if not found["devices"]:
        rows.append(("GPU", "none that torch can use"))
    return "\n".join(f"{name:<26}{value}" for name, value in rows)
