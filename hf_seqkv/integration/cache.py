"""`SeqKVCache`: a transformers cache whose history is pages of codes."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache

from ..codec.page import PageCodec
from ..config import SeqKVConfig
from ..errors import ConfigError, SeqKVWarning, UnsupportedModelError
from . import accounting, capture, mixed
from .codecs import calibration_of, page_codec
from .latent import refuse_calibration, wrap_expansions
from .layer import SeqKVLayer
from .model_facts import layer_configs, model_facts, weights_fingerprint
from .positions import PositionTable
from .recorder import Recorder
from .shards import WHOLE, shard_of

ROTARY_BITS = 8  # of the rotary keys beside latents: an eighth of the components, and part of every head's score
JOINED = 256  # forwards whose token ids are kept apart: joining them takes time, many small tensors memory

if TYPE_CHECKING:
    from .prefix import Prefixes


class SeqKVCache(capture.Listener, DynamicCache):
    """Cache for `generate` or a forward: pass it as `cache` (`past_key_values` before transformers 5.24).

    Upstream decides which layers there are; full and sliding attention layers become `SeqKVLayer`s, all others
    (linear attention, state spaces, ...) stay what they are.

    Args:
        config: The model's config, `model.config`.
        **options: Fields of `SeqKVConfig`.

    Raises:
        ConfigError: An unknown or invalid option, or no model config.
        UnsupportedModelError: No layer of the model can be coded.
        CalibrationMismatchError, CalibrationNotFoundError: See `SeqKVCalibration`.
    """

    def __init__(self, config=None, **options):
        if config is None:
            raise ConfigError("SeqKVCache needs the model's config: SeqKVCache(config=model.config)")
        self.seqkv_config = SeqKVConfig.from_dict(options)
        self.model_config = config
        self.expected_length = 0  # tokens the sequence will grow to, where known: `generate` says so
        text_config = config.get_text_config(decoder=True)
        self._refuse_unsupported(text_config)
        DynamicCache.__init__(self, config=config)
        capture.Listener.__init__(self)
        self.calibration = None
        if self.seqkv_config.method == "calibrated":
            self.calibration = calibration_of(self.seqkv_config.calibration)
            self.calibration.check(model_facts(text_config))
        found = [mixed.coded(layer, self, index, self.seqkv_config) for index, layer in enumerate(self.layers)]
        others = {type(layer).__name__ for layer, ours in zip(self.layers, found, strict=True) if ours is None}
        self.layers = [ours or layer for layer, ours in zip(self.layers, found, strict=True)]
        if not self._coded():
            raise UnsupportedModelError(
                f"{config.model_type}: no layer keeps plain keys and values ({', '.join(sorted(others))}); "
                "use the default cache for this model"
            )
        others.discard("DummyLayer")
        if others:
            warnings.warn(
                f"{config.model_type}: layers of type {', '.join(sorted(others))} hold no plain keys and values and "
                "stay uncompressed",
                SeqKVWarning,
                stacklevel=2,
            )
        if self.seqkv_config.prefix_store is not None:
            mixed.refuse_store(config.model_type, self.layers)
        self._codecs: dict[tuple, PageCodec] = {}
        self._tables: dict[int, PositionTable | None] = {}
        self.model: torch.nn.Module | None = None
        self.shard = WHOLE  # of the model's KV heads
        self._ids: list[torch.Tensor] = []  # of forwards in turn
        # Cosines and sines: what removes the constant part of keys, or undoes RoPE, needs them.
        self.tracks_positions = self.centers_keys
        self.recorder: Recorder | None = None
        self.prefixes: Prefixes | None = None
        capture.attach_on_first_call(self)

    def _refuse_unsupported(self, text_config) -> None:
        if getattr(self.model_config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{self.model_config.model_type} is an encoder-decoder model; SeqKVCache codes decoder-only models. "
                "Use the default cache"
            )
        layers = [x for x in layer_configs(text_config) if getattr(x, "kv_lora_rank", None)]
        # Of MLA layers: KV heads, components of a latent and of the rotary key beside it.
        self.latent_shapes = {(1, x.kv_lora_rank, getattr(x, "qk_rope_head_dim", None)) for x in layers}
        if layers and self.seqkv_config.method == "calibrated":
            refuse_calibration(text_config.model_type)

    def bind(self, model: torch.nn.Module) -> None:
        """Meet the model that uses this cache: hook it, and compare its weights with the calibration's."""
        self.model, self.shard = model, shard_of(model)
        capture.attach(model, self)
        wrap_expansions(model)
        store = self.seqkv_config.prefix_store
        if store is not None and self.prefixes is None:
            from .prefix import Prefixes  # which builds on this module

            self.prefixes = Prefixes(self, model, store)
        if self.calibration is not None:
            self.calibration.check_weights(weights_fingerprint(model))

    def _coded(self) -> list[SeqKVLayer]:
        return [layer for layer in self.layers if isinstance(layer, SeqKVLayer)]

    def __deepcopy__(self, memo):
        # Codecs, calibration and configs are immutable and shared.
        shared = (self.model, self.model_config, self.seqkv_config, self.calibration, self.shard)
        memo |= {id(x): x for x in (*shared, *self._codecs.values())}
        memo[id(self)] = new = self.__class__.__new__(self.__class__)
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        capture.attach_on_first_call(new)
        return new

    # -- what layers ask for -------------------------------------------------------------------------------------

    def codec(self, index: int, heads: int, key_dim: int, value_dim: int, dtype, device) -> PageCodec:
        """Page codec of a layer; layers with the same tables share one."""
        shape, method = (heads, key_dim, value_dim), self.seqkv_config.method
        key = (*shape, device, *{"calibrated": (index,), "dense": (dtype,)}.get(method, ()))
        if key not in self._codecs:
            rest = ROTARY_BITS if shape in self.latent_shapes else self.seqkv_config.value_bits
            made = page_codec(self.seqkv_config, self.calibration, index, shape, dtype, rest, self.shard)
            self._codecs[key] = made.to(device)
        return self._codecs[key]

    @property
    def centers_keys(self) -> bool:
        return self.seqkv_config.method == "calibrated" or bool(self.seqkv_config.center_keys)

    def noted(self, index: int) -> capture.Noted:
        """As `Listener.noted`; a latent is not what the model's RoPE turns."""
        noted, codec = super().noted(index), self.layers[index].codec
        latent = (codec.heads, codec.key_dim, codec.value_dim) in self.latent_shapes
        return replace(noted, layout=None) if latent else noted

    def note_ids(self, ids: torch.Tensor | None) -> None:
        if ids is not None:
            self._ids.append(ids)
            if len(self._ids) > JOINED:
                self._ids = [torch.cat([x.to(self._ids[-1].device) for x in self._ids], 1)]

    @property
    def ids(self) -> torch.Tensor | None:
        """Token ids of all slots, `[B, T]`; None where some forward was given embeddings, or came before `bind`."""
        if len(self._ids) > 1:
            self._ids = [torch.cat([x.to(self._ids[-1].device) for x in self._ids], 1)]
        known = self._ids[0].shape[1] if self._ids else 0
        return self._ids[0].cpu() if known and known == self.get_seq_length() else None

    @ids.setter
    def ids(self, ids: torch.Tensor | None) -> None:
        self._ids = [] if ids is None else [ids]

    def after_forward(self, hidden: torch.Tensor | None) -> None:
        if self.prefixes is not None:
            self.prefixes.after_forward(hidden)

    def initial_mean(self, batch: int, heads: int, dim: int, device) -> torch.Tensor | None:
        """Constant key part before a row's first page, `[B, H, D]`; None where none is removed."""
        if not self.centers_keys:
            return None
        return torch.zeros(batch, heads, dim, device=device)

    def table(self, index: int, noted: capture.Noted | None = None) -> PositionTable | None:
        """Position table of a layer; chosen at its first update, shared by layers that got the same cos and sin."""
        if not self.tracks_positions:
            return None
        if index not in self._tables:
            if noted is None:
                return None
            layout, config = noted.layout, self.seqkv_config
            half, interleaved = (layout.half, layout.interleaved) if layout else (0, False)
            sort = half, interleaved, self.layers[index].device
            if self.calibration is not None:
                self.calibration.check_rope(index, half, interleaved)
            for table in self._tables.values():
                if (table.half, table.interleaved, table.device) == sort and table.follows(noted):
                    break
            else:
                keep = config.n_sink + config.residual_length + 2 * config.page_size
                table = PositionTable(*sort, config.page_size, keep)
            self._tables[index] = table
        return self._tables[index]

    def importance(self, index: int, device) -> torch.Tensor | None:
        """Weights of `codec.importance.features` by which a layer holds tokens dense; None where it holds none."""
        heads, rank = self.layers[index].codec.heads, self.shard.rank
        weights = None if self.calibration is None else self.calibration.held(index, heads, rank)
        return None if weights is None else weights.to(device)

    def before_pages(self, index: int, rows: list[int], first: int, slot: int, k, v):
        """Pages of layer `index` about to be made, dense: what `rows` get in place of them.

        Args:
            first, slot: Number of the first page of each row, and slot of its first token.
            k, v: `[len(rows), N, H, P, D]`.
        """
        if self.recorder is not None:
            self.recorder.see(index, rows, first, slot, k, v)
        return k, v

    def _distinct_tables(self) -> list[PositionTable]:
        return list({id(t): t for t in self._tables.values()}.values())

    # -- editing: layers first, then what they share -------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        ids = self.ids
        super().crop(tokens_to_remove)
        self.ids = None if ids is None else ids[:, : self.get_seq_length()]
        for index, table in self._tables.items():
            layer = self.layers[index]
            if layer.length == 0:
                table.clear()
            else:
                pages = [count + (kept > 0) for count, kept in zip(layer.counts, layer.kept, strict=True)]
                table.crop(layer.length, pages)

    def _select(self, index: torch.Tensor) -> None:
        for table in self._distinct_tables():
            table.select(index)
        self._ids = [ids[index.to(ids.device)] for ids in self._ids]

    def _batch(self) -> int:
        return max((len(layer.start) for layer in self._coded()), default=0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx.cpu())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self._batch()
        super().batch_repeat_interleave(repeats)
        self._select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = self._batch()
        super().batch_select_indices(indices)
        self._select(torch.arange(rows)[torch.as_tensor(indices).cpu()])

    def reset(self) -> None:
        super().reset()
        self._tables.clear()
        self._noted.clear()
        self.ids = None

    # -- accounting ----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> int:
        """Write the session to a file (one a rank), from which `load` wakes it bit-identical; returns its bytes.

        See `sleep.py`.
        """
        from .sleep import save

        return save(self, path)

    @staticmethod
    def load(path: str | Path, model: torch.nn.Module, calibration=None) -> SeqKVCache:
        """The session that `save` wrote, for the same model; see `sleep.py`."""
        from .sleep import load

        return load(path, model, calibration)

    def memory(self) -> dict[str, int]:
        """Bytes held, by part, their sum `total`, and how many of these are offloaded to the `host`'s memory.

        `codes` and `side_information` (scales, padding of pages, key means, page positions, held tokens) are the
        compressed tokens; `sinks` and `recent` dense tokens; `slack` room for more; `staging` room that offloaded pages
        pass through; `tables` rotations, codebooks and recent cosines, shared by layers; `ids` the tokens', for stores;
        `uncompressed` layers of other kinds.
        """
        return accounting.memory(self)

    def bits_per_value(self) -> float:
        """Bytes of the compressed tokens (codes and side information) x 8 / the key and value components they hold.

        Sinks, recent tokens and tables that do not grow with the sequence are not in it; `memory()` states them.
        NaN before the first page.
        """
        return accounting.bits_per_value(self)
