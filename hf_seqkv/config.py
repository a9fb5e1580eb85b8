"""`SeqKVConfig`: every option of a cache, validated, with a JSON round trip. The only place with defaults."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

BITS = (2, 3, 4, 5, 6, 8)
BACKENDS = ("auto", "reference", "cpu", "triton")
CHOICES = {
    "method": ("dense", "turboquant", "calibrated"),
    "backend": BACKENDS,
    "rotation": ("hadamard", "orthogonal"),
    "codebook": ("lloyd_max", "uniform"),
    "scale": ("fit", "norm"),
    "scale_bits": (8, 16),
}
# Options that only the data-free method reads, with their defaults. A calibration brings its own.
DATA_FREE = {
    # A key's error goes through an exponential, a value's is averaged: the odd bit goes to the keys.
    "key_bits": 5,
    "value_bits": 4,
    "rotation": "hadamard",
    "codebook": "lloyd_max",
    "scale": "fit",
    "scale_bits": 8,
    "center_keys": True,
    "seed": 0,
}


@dataclass(frozen=True)
class SeqKVConfig:
    """Options of a `SeqKVCache`.

    Args:
        method: `"dense"` (lossless pages), `"turboquant"` (data-free rotation and codebook, arXiv 2504.19874)
            or `"calibrated"`. Default: `"calibrated"` where a calibration is given, else `"turboquant"`.
        calibration: Directory or Hub repository of a calibration, or a `SeqKVCalibration`.
        page_size: Tokens a page; a multiple of 8.
        n_sink: First tokens of every row kept dense.
        residual_length: Least number of last tokens kept dense; up to `page_size` more wait for their page.
        prefix_store: Directory or URL of a prefix store, or a `PrefixStore`: prompts that begin like earlier ones load
            what those left there.
        offload: Keep pages in host memory, and bring a layer's to its device when it attends (layers on a GPU only).
        cuda_graphs: In `generate` on a CUDA device, record a step as a CUDA graph and replay it where that is possible.
        backend: `"auto"`, `"reference"` (torch), `"cpu"` (numba) or `"triton"`. `HF_SEQKV_BACKEND` overrides `"auto"`.
        key_bits, value_bits: Bits a code: 2, 3, 4, 5, 6 or 8 (data-free method only, as all that follow).
        rotation: `"hadamard"` with random signs (head dims that are a power of two, else `"orthogonal"`), or
            `"orthogonal"`, the QR factor of a Gaussian matrix, as published.
        codebook: `"lloyd_max"` for a coordinate of a random unit vector, or `"uniform"`.
        scale: `"fit"` stores the least-squares gain of each vector, `"norm"` its length, as published.
        scale_bits: Of a stored scale: 8, or 16, as published.
        center_keys: Remove each row's constant key component, before RoPE where the model's RoPE is known.
        seed: Of the random rotation.

    Raises:
        ConfigError: A value is out of its range, or an option has no meaning for the method.
    """

    method: str | None = None
    calibration: Any = None
    page_size: int = 64
    n_sink: int = 4
    residual_length: int = 32
    prefix_store: Any = None
    offload: bool = False
    cuda_graphs: bool = True
    backend: str = "auto"
    key_bits: int | None = None
    value_bits: int | None = None
    rotation: str | None = None
    codebook: str | None = None
    scale: str | None = None
    scale_bits: int | None = None
    center_keys: bool | None = None
    seed: int | None = None

    def __post_init__(self):
        if self.method is None:
            object.__setattr__(self, "method", "turboquant" if self.calibration is None else "calibrated")
        self._check_choices()
        self._check_method()
        self._check_numbers()

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value is not None and (value not in allowed or type(value) is not type(allowed[0])):
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
        for name in ("key_bits", "value_bits"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value not in BITS):
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, BITS))}")
        for name in ("center_keys", "offload", "cuda_graphs"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name != "center_keys"):
                raise ConfigError(f"{name}={value!r} must be True or False")

    def _check_method(self) -> None:
        if self.method == "calibrated" and self.calibration is None:
            raise ConfigError(
                "method='calibrated' needs calibration=<directory, Hub repository or SeqKVCalibration>; "
                "make one with `seqkv calibrate MODEL`, or use method='turboquant', which needs none"
            )
        if self.method != "calibrated" and self.calibration is not None:
            raise ConfigError(f"method={self.method!r} does not read a calibration; leave one of the two out")
        for name, default in DATA_FREE.items():
            value = getattr(self, name)
            if self.method == "turboquant":
                object.__setattr__(self, name, default if value is None else value)
            elif value is not None:
                raise ConfigError(f"{name}={value!r} has no meaning for method={self.method!r}; leave it out")

    def _check_numbers(self) -> None:
        for name, least in (("page_size", 8), ("n_sink", 0), ("residual_length", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            if type(value) is not int or value < least:
                raise ConfigError(f"{name}={value!r} must be an integer of at least {least}")
        if self.page_size % 8 or self.page_size > 1024:
            low = min(self.page_size // 8 * 8, 1024)
            nearest = f"{low} or {low + 8}" if low < 1024 else "1024"
            raise ConfigError(f"page_size={self.page_size} must be a multiple of 8 up to 1024; nearest: {nearest}")

    @classmethod
    def published_turboquant(cls, bits: int = 4, **windows) -> SeqKVConfig:
        """TurboQuant exactly as published (arXiv 2504.19874, algorithm 1): the baseline, without our refinements."""
        return cls(
            method="turboquant",
            key_bits=bits,
            value_bits=bits,
            rotation="orthogonal",
            codebook="lloyd_max",
            scale="norm",
            scale_bits=16,
            center_keys=False,
            **windows,
        )

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> SeqKVConfig:
        """Build from a `cache_config` dict.

        Raises:
            ConfigError: A name is not an option; the message names the closest one.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(options, dict):
            raise ConfigError(f"options must be a dict of {', '.join(names)}; got {type(options).__name__}")
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise ConfigError(f"unknown option {name!r}{hint} Options: {', '.join(names)}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Options that are set, as JSON types; a calibration object is named by its source."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options = {name: value for name, value in options.items() if value is not None}
        for name, default in (("offload", False), ("cuda_graphs", True)):
            if getattr(self, name) == default:
                del options[name]  # what was stored before there was such an option has none
        for name, told in (("calibration", "source"), ("prefix_store", "url")):
            if name in options:
                options[name] = str(getattr(options[name], told, options[name]))
        return options

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SeqKVConfig:
        return cls.from_dict(json.loads(text))
