"""`SeqKVCalibration`: the rotations, bit widths and codebooks fitted for one model, and their files.

A calibration is a directory or a Hub repository with three files:

    calibration.safetensors   tensors, see `layout.py`; its metadata is one key, `hf_seqkv`, with the format version
    seqkv_config.json         what it was made for and from
    README.md                 the model card
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..codec import importance
from ..codec.exact_tables import ExactTables
from ..codec.page import QuantizedPageCodec
from ..codec.sequence import SequenceCodec
from ..codec.sequence_part import Part
from ..codec.symbol_tables import SymbolTables
from ..codec.vector import VectorCodec
from ..errors import CalibrationMismatchError, CalibrationNotFoundError, ConfigError, FormatError, SeqKVWarning
from .exact_fit import fit_exact, sampled_pages
from .hub import CONFIG_NAME, TENSORS_NAME, download
from .layout import PARTS, SEQUENCE_PARTS, SIDES, check_shapes
from .sequence_fit import Sample

FORMAT_VERSION = 4
CARD_NAME = "README.md"
STEPS = 64  # quarter octaves either way: beyond a factor of 2**16 steps, sizes mean nothing


def _part(heads: int, whole: int, rank: int) -> slice:
    """Which of a layer's `whole` heads a rank of `heads` has: its own, or all where all have all."""
    first = rank * heads if heads < whole else 0
    return slice(first, first + heads)


@dataclass(eq=False)
class SeqKVCalibration:
    """A calibration in memory.

    Args:
        tensors: By name, see `layout.py`.
        config: Contents of `seqkv_config.json`: `format_version`, `model` (the facts that must match), `weights`
            (fingerprint), `rope` (per layer `[half, interleaved]`), and how it was made.
        source: Where it came from, for messages.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    source: str = "<memory>"
    card: str | None = field(default=None, repr=False)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of all that decides what pages hold, and what they are stored as."""
        digest = hashlib.sha256(json.dumps([self.config[x] for x in ("scale_bits", "model")], sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            if not name.startswith("texts."):
                digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
        return digest.digest()

    # -- use -----------------------------------------------------------------------------------------------------

    def page_codec(
        self, index: int, heads: int, key_dim: int, value_dim: int, page_size: int, rank: int = 0, ranks: int = 1
    ) -> QuantizedPageCodec:
        """Codec of a layer's pages, of all its `heads` KV heads, or of those that rank `rank` of `ranks` has of them.

        Raises:
            CalibrationMismatchError: The layer has another shape.
        """
        sides = []
        for side, dim in zip(SIDES, (key_dim, value_dim), strict=True):
            part = {name: self.tensors[f"{index}.{side}.{name}"] for name in PARTS}
            if tuple(part["std"].shape) not in ((heads, dim), (heads * ranks, dim)):
                raise CalibrationMismatchError(
                    f"{self.source}: layer {index} {side}s were calibrated for (KV heads, head dim) "
                    f"{tuple(part['std'].shape)}, the model has {(heads, dim)}; run `seqkv calibrate` for this model"
                )
            part = {name: x[_part(heads, len(x), rank)] for name, x in part.items()}
            decode = part["rotation"] * part["std"][..., None]
            encode = (part["rotation"] / part["std"][..., None]).transpose(1, 2).contiguous()
            levels = torch.nn.functional.pad(part["levels"], (0, 256 - part["levels"].shape[-1]))
            tables = (encode, decode, torch.zeros(heads, dim), part["widths"], levels)
            sides.append(VectorCodec(*tables, "fit", page_size, self.config["scale_bits"]))
        return QuantizedPageCodec(*sides)

    def held(self, index: int, heads: int, rank: int = 0) -> torch.Tensor | None:
        """Weights by which a layer holds tokens dense, arguments as in `page_codec`; ranks add up their scores."""
        weights, whole = self.tensors.get(f"{index}.held"), len(self.tensors[f"{index}.key.std"])
        return None if weights is None else importance.of_heads(weights, whole, _part(heads, whole, rank))

    def sequence_codec(self, profile: str = "full", step: int | str = 0) -> SequenceCodec:
        """The sequence codec of a profile, `"full"` or `"light"`.

        Args:
            step: Quarter octaves from the calibration's own, -64 to 64, more is smaller and coarser; or a preset's
                name, `"fine"`, `"balanced"` or `"small"`.

        Raises:
            ConfigError: The calibration has none, or none of this profile; or the step is not one of these.
        """
        made = self.config.get("sequence", {})
        if profile not in made:
            raise ConfigError(
                f"{self.source} has no sequence codec {profile!r} (it has: {', '.join(made) or 'none'}); run "
                "`seqkv calibrate` without --no-sequence"
            )
        presets = made[profile].get("presets", {})
        step = presets.get(step, step)
        if not isinstance(step, int) or abs(step) > STEPS:
            known = f"a whole number from {-STEPS} to {STEPS} or a preset ({', '.join(presets) or 'it has none'})"
            raise ConfigError(f"{self.source}: step={step!r} is not {known}")

        def tensor(name: str) -> torch.Tensor | None:
            return self.tensors.get(f"sequence.{profile}.{name}")

        parts = []
        for index in range(2 * self.config["model"]["num_hidden_layers"]):
            prefix = f"{index // 2}.{SIDES[index % 2]}"
            fields = {name: tensor(f"{prefix}.{name}") for name in SEQUENCE_PARTS}
            fields |= {"share": int(fields["share"]), "inputs": tuple(fields["inputs"].tolist())}
            parts.append(Part(**fields))
        return SequenceCodec(parts, tensor("along"), SymbolTables(tensor("tables")), made[profile]["base"], step)

    def add_exact(self, sample: Sample, rows: Sequence[torch.Tensor], progress: bool = True) -> None:
        """Fit the tables of the exact codec to these hot pages; arguments as `sampled_pages` has them."""
        parts = self.sequence_codec("full").parts
        codecs = []
        for i in range(len(rows)):
            shapes = [self.tensors[f"{i}.{side}.std"].shape for side in SIDES]
            codecs.append(self.page_codec(i, shapes[0][0], shapes[0][1], shapes[1][1], sample.positions.shape[1]))
        interleaved = [layout[1] for layout in self.config["rope"]]
        tables = fit_exact(codecs, *sampled_pages(codecs, sample, rows, interleaved), parts, progress=progress)
        self.tensors |= {f"exact.{name}": x for name, x in tables.tensors().items()}

    def exact(self) -> tuple[list[Part], ExactTables] | tuple[()]:
        """What `ExactCodec` takes beside these hot pages' codecs; nothing where the calibration has none.

        Raises:
            FormatError: Tables are missing.
        """
        found = {name.partition(".")[2]: x for name, x in self.tensors.items() if name.startswith("exact.")}
        return (self.sequence_codec("full").parts, ExactTables.from_tensors(found)) if found else ()

    def check(self, facts: dict[str, Any]) -> None:
        """Compare with a model's facts (`integration.model_facts`).

        Raises:
            CalibrationMismatchError: Naming every fact that differs.
        """
        mine = self.config["model"]
        differ = [
            f"{name}: calibration {mine.get(name)!r}, model {facts.get(name)!r}"
            for name in sorted({*mine, *facts})
            if mine.get(name) != facts.get(name)
        ]
        if differ:
            raise CalibrationMismatchError(
                f"{self.source} was made for another model ({'; '.join(differ)}); run `seqkv calibrate` for this one, "
                "or use method='turboquant', which needs no calibration"
            )

    def check_rope(self, index: int, half: int, interleaved: bool) -> None:
        """Compare the RoPE that was captured with the one calibrated for.

        Raises:
            CalibrationMismatchError: They differ.
        """
        expected = self.config["rope"][index]
        if expected != [half, interleaved] and half == 0:
            warnings.warn(
                f"{self.source}: the model's RoPE was not captured, so the constant part of the keys stays in the "
                "codes and quality drops; let generate() make the cache, or build it with config=model.config",
                SeqKVWarning,
                stacklevel=2,
            )
        elif expected != [half, interleaved]:
            raise CalibrationMismatchError(
                f"{self.source}: layer {index} was calibrated with RoPE (pairs, interleaved) {expected}, the model "
                f"uses {[half, interleaved]}; run `seqkv calibrate` for this model"
            )

    def check_weights(self, fingerprint: str) -> None:
        """Warn if the calibration was made with other weights of the same shape."""
        if fingerprint != self.config["weights"]:
            warnings.warn(
                f"{self.source} was made with other weights (fingerprint {self.config['weights'][:12]}, this model "
                f"{fingerprint[:12]}); results are valid, their quality is not what the card states",
                SeqKVWarning,
                stacklevel=3,
            )

    # -- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write the three files; returns the directory."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        # One metadata key: safetensors writes several in no fixed order, and equal calibrations should be equal bytes.
        metadata = {"hf_seqkv": json.dumps({"format_version": FORMAT_VERSION})}
        tensors = {name: tensor.contiguous() for name, tensor in sorted(self.tensors.items())}
        save_file(tensors, directory / TENSORS_NAME, metadata=metadata)
        (directory / CONFIG_NAME).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        if self.card is not None:
            (directory / CARD_NAME).write_text(self.card)
        return directory

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> SeqKVCalibration:
        """Load from a directory or a Hub repository; `HF_HUB_OFFLINE` is honoured.

        Raises:
            CalibrationNotFoundError: Nothing there, or not reachable.
            FormatError: Damaged files or another format version.
        """
        directory = Path(pretrained)
        if not directory.is_dir():
            directory = download(str(pretrained), revision, token, cache_dir, local_files_only)
        missing = [name for name in (TENSORS_NAME, CONFIG_NAME) if not (directory / name).is_file()]
        if missing:
            raise CalibrationNotFoundError(
                f"{pretrained} holds no calibration: {' and '.join(missing)} missing; make one with "
                f"`seqkv calibrate MODEL --out {pretrained}`"
            )
        try:
            config = json.loads((directory / CONFIG_NAME).read_text())
            tensors = load_file(directory / TENSORS_NAME)
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise FormatError(f"{pretrained}: damaged calibration ({error}); download or make it again") from error
        card = directory / CARD_NAME
        made = cls(tensors, config, str(pretrained), card.read_text() if card.is_file() else None)
        made._validate()
        return made

    def _validate(self) -> None:
        version = self.config.get("format_version")
        if version != FORMAT_VERSION:
            raise CalibrationMismatchError(
                f"{self.source}: calibration format version {version!r}, this hf_seqkv reads {FORMAT_VERSION}; "
                "upgrade hf_seqkv or run `seqkv calibrate` again"
            )
        missing = {"model", "weights", "rope", "scale_bits"} - set(self.config)
        if missing:
            raise FormatError(f"{self.source}: {CONFIG_NAME} lacks {', '.join(sorted(missing))}")
        check_shapes(self.tensors, self.config, self.source)
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise FormatError(f"{self.source}: tensor {name} is not finite")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload SeqKV calibration",
    ) -> str:
        """Upload the three files to a model repository, made if need be; returns the commit's URL."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=directory, revision=revision, commit_message=commit_message
            )
        return str(commit)
