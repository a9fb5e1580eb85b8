"""Ranks of the tests of tensor parallelism: `ranks.py FOLDER`, started as torchrun does, runs every check on a model.

The folder has the model, a calibration, and what one process made of them (`test_tensor_parallel.py`). Each rank leaves
there what went wrong, by check.
"""

import copy
import os
import sys
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import LOSSLESS, SMALL, prompt
from test_calibration import TEXT, Words
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

from hf_seqkv import SeqKVCache, SeqKVCalibration, calibrate
from hf_seqkv.errors import (
    CalibrationMismatchError,
    ConfigError,
    FormatError,
    SeqKVError,
    SeqKVWarning,
    UnsupportedModelError,
)
from hf_seqkv.integration import learned_tables, prefix
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.sequence_cache import SequenceCache
from hf_seqkv.integration.shards import shard_of
from hf_seqkv.integration.state import state_of
from hf_seqkv.store.planner import Rates
from hf_seqkv.store.prefix_store import PrefixStore

RANKS, SINKS, PAGE = 2, 4, SMALL["page_size"]
PADDED = (0, 5)
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8},
}
# Projections whose outputs all ranks gather, as Phi-3's and OLMo 2's: every rank has all heads.
GATHERED = {
    **{f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"},
    "model.layers.*.self_attn.o_proj": "rowwise_split_input",
}


def shared(folder, plan="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan=plan)).eval()


def generated(model, rows=2, cache=None, mode="greedy", tokens=8, **options):
    """Tokens after a prompt of so many rows, the second left-padded; or all that `generate` returns."""
    ids, mask = prompt(rows, 61, PADDED[:rows])
    torch.manual_seed(7)
    if cache is not None:
        options[CACHE_NAME] = cache
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **MODES[mode], **options)


def prefilled(model, calibration=None, **options):
    """A cache after a prompt of one row."""
    options |= {} if calibration is None else {"calibration": calibration}
    cache = SeqKVCache(config=model.config, **SMALL | options)
    with torch.no_grad():
        model(prompt(1, 61)[0], **{CACHE_NAME: cache})
    return cache


def told(cache) -> list[dict]:
    """What a cache of one row holds, layer by layer."""
    return [
        {
            "keys": layer.keys,
            "values": layer.values,
            "codes": layer.codec.section(layer.pages[0, : layer.counts[0]], "key_codes"),
            "held": [] if layer.held is None else sorted(layer.held.slots[0, : layer.held.counts[0]].tolist()),
        }
        for layer in cache.layers
    ]


class Run:
    """What the checks of one rank have at hand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = shared(folder / "model")
        self.calibration = SeqKVCalibration.from_pretrained(folder / "calibration")
        self.wanted = torch.load(folder / "wanted.pt")
        self.rank = dist.get_rank()

    @contextmanager
    def store(self, name, **options):
        """A store of the ranks; nothing that was measured decides what it loads."""
        with PrefixStore(self.folder / name, **options) as store:
            store.rates = lambda: Rates({}, None)
            yield store
            dist.barrier()

    def through(self, store, options=LOSSLESS, rows=1, **more):
        """Tokens, and pages that were loaded."""
        made = generated(
            self.model,
            rows,
            cache_implementation="seqkv",
            cache_config={**options, "prefix_store": store},
            return_dict_in_generate=True,
            **more,
        )
        store.flush()
        dist.barrier()
        prefixes = made[CACHE_NAME].prefixes
        return made, prefixes.plan.load if prefixes.loaded else 0

    def entries(self, store, options=LOSSLESS) -> list[Path]:
        """Files of this rank's pages of the prompt, in turn."""
        cache = SeqKVCache(config=self.model.config, prefix_store=store, **options)
        cache.bind(self.model)
        split = cache.prefixes._split(prompt(1, 61)[0][0].tolist())
        keys = store.find(cache.prefixes.scope, split)
        return [next((Path(store.url) / "objects").glob(f"*/{key.hex()}")) for key in keys]


def warned(expected, words):
    """Warnings are given that say this, or none."""
    return pytest.warns(SeqKVWarning, match=words) if expected else nullcontext()


def assert_like_one_process(run, cache, wanted, whole=False):
    """A rank's heads hold what those of one process do, but for the rounding of split sums."""
    for layer, mine, theirs in zip(cache.layers, told(cache), wanted, strict=True):
        heads = theirs["keys"].shape[1]
        at = slice(None) if whole else slice(run.rank * heads // RANKS, (run.rank + 1) * heads // RANKS)
        for name in ("keys", "values"):
            assert mine[name].shape == theirs[name][:, at].shape
            assert (mine[name] - theirs[name][:, at]).norm() < 5e-3 * theirs[name][:, at].norm(), name
        assert mine["held"] == theirs["held"]
        widths = layer.codec.key.widths
        if len(widths.unique()) == 1:  # codes of a head are one run of bytes
            own, codes = (x.unflatten(1, (-1, widths[0].sum() * PAGE // 8)) for x in (mine["codes"], theirs["codes"]))
            assert (own == codes[:, at]).float().mean() > 0.99


# -- checks --------------------------------------------------------------------------------------------------------


def check_ranks_are_known(run):
    shard = shard_of(run.model)
    assert (shard.rank, shard.ranks) == (run.rank, RANKS)
    assert shard_of(run.model.model) == shard, "its weights tell"
    assert shard.gather(bytes([run.rank])) == [b"\0", b"\1"]
    assert shard.least(5 - run.rank, run.rank, -3) == [4, 0, -3]
    assert shard.sum(torch.tensor([1.5, run.rank])).tolist() == [3, 1]
    error = (ZeroDivisionError, "division") if run.rank else (SeqKVError, "another one failed")
    with pytest.raises(error[0], match=error[1]), shard.together():
        assert 1 / (1 - run.rank)


def check_tokens_are_those_of_the_dense_cache(run):
    for mode in MODES:
        dense = generated(run.model, cache=DynamicCache(config=run.model.config), mode=mode)
        ours = generated(run.model, mode=mode, cache_implementation="seqkv", cache_config=LOSSLESS)
        assert torch.equal(ours, dense), mode
        assert torch.equal(ours, run.wanted[mode]), mode


def check_each_rank_codes_its_heads(run):
    cache = prefilled(run.model)
    assert cache.layers[0].codec.heads == 2
    assert_like_one_process(run, cache, run.wanted["data-free"])
    assert torch.equal(copy.deepcopy(cache).layers[1].keys, cache.layers[1].keys)
    assert run.wanted["codes of all heads"] == RANKS * sum(layer.pages.numel() for layer in cache.layers)


def check_a_calibration_is_sliced(run):
    cache = prefilled(run.model, run.calibration)  # nor does it warn of other weights
    assert any(layer.held.counts[0] for layer in cache.layers)
    assert_like_one_process(run, cache, run.wanted["calibrated"])
    ours = generated(run.model, cache=SeqKVCache(config=run.model.config, calibration=run.calibration, **SMALL))
    assert torch.equal(ours[:, :62], run.wanted["greedy"][:, :62])
    ids = prompt(1, 61)[0][:, -1:]
    with torch.no_grad():
        logits = run.model(ids, **{CACHE_NAME: cache}).logits
    assert (logits - run.wanted["step"]).norm() < 1e-2 * run.wanted["step"].norm()


def check_other_weights_are_noticed(run):
    other = SeqKVCalibration(run.calibration.tensors, run.calibration.config | {"weights": "0" * 64})
    with warned(True, "other weights"):
        prefilled(run.model, other)


def check_what_needs_all_heads_is_refused(run):
    with run.store("sequence", form="sequence") as store, pytest.raises(ConfigError, match="form='hot'"):
        prefilled(run.model, run.calibration, prefix_store=store)
    with pytest.raises(ConfigError, match="form='hot'"):
        SequenceCache(run.model.config, run.calibration).bind(run.model)
    with pytest.raises(UnsupportedModelError, match="one process"):
        calibrate(run.model, Words(), [TEXT], tokens=264, window=264, progress=False)
    with pytest.raises(CalibrationMismatchError, match="for this model"):
        run.calibration.page_codec(0, 1, 8, 8, PAGE, run.rank, RANKS)


def check_pages_of_all_ranks_load(run):
    with run.store("store") as store:
        for rows, mode, pages in ((1, "one row", 7), (2, "greedy", 6)):
            for expected in (0, pages):
                made, loaded = run.through(store, rows=rows)
                assert loaded == expected
                assert torch.equal(made.sequences, run.wanted[mode])
        scopes = shard_of(run.model).gather(made[CACHE_NAME].prefixes.scope)
        assert len(set(scopes)) == RANKS
        assert store.stat()["entries"] == RANKS * run.wanted["pages of two rows"]


def check_a_page_that_one_rank_lacks(run):
    """All load the pages before it, and it is stored again."""
    with run.store("lacking") as store:
        run.through(store)
        for page, harm in ((5, "delete"), (3, "damage"), (0, "delete")):
            file = run.entries(store)[page]
            if run.rank == 1:
                file.unlink() if harm == "delete" else file.write_bytes(file.read_bytes()[:-1])
            dist.barrier()
            with warned(run.rank == 1 and harm == "damage", "counts as missing"):
                made, _ = run.through(store)
            assert made[CACHE_NAME].prefixes.loaded == (SINKS + PAGE * page if page else 0)
            assert torch.equal(made.sequences, run.wanted["one row"])
        assert run.through(store)[1] == 7


def check_a_page_that_one_rank_cannot_read(run):
    """All prefill, whether it fails before or after the ranks agreed on the pages."""
    with run.store("foreign") as store:
        cache = SeqKVCache(config=run.model.config, prefix_store=store, **LOSSLESS)
        cache.bind(run.model)
        scope, first = cache.prefixes.scope, prompt(1, 61)[0][0, : SINKS + PAGE].tolist()
        if run.rank == 1:
            store.put(scope, b"", first, b"?" * 99, form="hot", bits=None)
        assert run.through(store)[1] == 0
        with warned(run.rank == 1, "prefilled instead"):
            assert run.through(store)[1] == 0
        assert run.through(store)[1] == 7
        original = prefix.fill
        if run.rank == 1:
            prefix.fill = lambda *args: (original(*args), 1 / 0)
        with warned(run.rank == 1, "prefilled instead"):
            made, loaded = run.through(store)
        prefix.fill = original
        assert loaded == 0
        assert torch.equal(made.sequences, run.wanted["one row"])
        assert run.through(store)[1] == 7


def check_one_decision_of_all_planners(run):
    with run.store("planner") as store:
        run.through(store)
        if run.rank == 1:
            store.rates = lambda: Rates({"hot": 1e3}, (1e-9, 0.0))
        made, loaded = run.through(store)
        assert loaded == 0
        assert made[CACHE_NAME].prefixes.plan.load == 0
        assert torch.equal(made.sequences, run.wanted["one row"])


def check_exact_tables_of_each_rank(run):
    """A calibration's tables predict across heads; those that the store learns are of a rank's own pages."""
    learned_tables.TOKENS_AN_INPUT, learned_tables.LEAST_TOKENS = 0, 40
    codes = {**SMALL, "calibration": run.calibration}
    with run.store("exact", form="exact") as store:
        with warned(True, "learns tables for each rank"):
            run.through(store, codes)
            store.flush(slow=True)
            dist.barrier()
            made, _ = run.through(store, codes, rows=2)
            again, loaded = run.through(store, codes, rows=2)
        assert loaded == 6
        for a, b in zip(made[CACHE_NAME].layers, again[CACHE_NAME].layers, strict=True):
            assert torch.equal(a.pages[:, :6], b.pages[:, :6])
        forms = [entry.form for entry in store.entries()]
        assert forms.count("tables") == RANKS
        assert forms.count("exact") >= RANKS * 6


def check_sessions(run):
    cache = SeqKVCache(config=run.model.config, **SMALL)
    made = generated(run.model, cache=cache)
    path = run.folder / "session"
    size = cache.save(path)
    own = run.folder / f"session.rank{run.rank}-of-2"
    assert own.stat().st_size == size
    assert not path.exists()
    woken = SeqKVCache.load(path, run.model)
    (mine, facts), (other, others) = state_of(cache), state_of(woken)
    assert facts == others
    assert all(torch.equal(mine[name], other[name]) for name in mine | other)
    on = [run.model.generate(made, **{CACHE_NAME: x}, max_new_tokens=5, do_sample=False) for x in (cache, woken)]
    assert torch.equal(*on)
    dist.barrier()
    with pytest.raises(CalibrationMismatchError, match=f"session.rank0-of-2.*this is rank {run.rank} of 2"):
        SeqKVCache.load(run.folder / "session.rank0-of-2", run.model)
    with pytest.raises(CalibrationMismatchError, match="as many ranks"):
        SeqKVCache.load(run.folder / "session of one process", run.model)
    with pytest.raises(FileNotFoundError):
        SeqKVCache.load(run.folder / "no session", run.model)
    keep = own.read_bytes()
    woken.save(path)  # longer by now
    if run.rank == 1:
        own.write_bytes(keep)
    with pytest.raises(FormatError, match="different sessions"):
        SeqKVCache.load(path, run.model)
    if run.rank == 1:
        own.write_bytes(keep[:-1])
    with pytest.raises(FormatError if run.rank else SeqKVError, match="damaged" if run.rank else "another one failed"):
        SeqKVCache.load(path, run.model)
    dist.barrier()
    if run.rank == 0:
        own.replace(run.folder / "session.rank1-of-2")
    dist.barrier()
    with pytest.raises(CalibrationMismatchError, match="saved by rank 0" if run.rank else "there is no"):
        SeqKVCache.load(path, run.model)
    cache.save(run.folder / "for one process")


def check_latents(run):
    """All ranks hold them, each expands its own heads of them, and nothing is rebuilt for that."""
    model = shared(run.folder / "latents")
    ours = generated(model, cache_implementation="seqkv", cache_config=LOSSLESS)
    assert torch.equal(ours, run.wanted["latents"])
    assert isinstance(model.model.layers[0].self_attn.kv_b_proj.weight, DTensor)


def check_ranks_that_have_all_heads(run):
    model = shared(run.folder / "model", GATHERED)
    assert shard_of(model).ranks == RANKS
    ours = generated(model, cache_implementation="seqkv", cache_config=LOSSLESS)
    assert torch.equal(ours, run.wanted["greedy"])
    assert_like_one_process(run, prefilled(model, run.calibration), run.wanted["calibrated"], whole=True)


CHECKS = {name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")}


def main(folder: Path) -> None:
    warnings.simplefilter("error", SeqKVWarning)
    place = {"rank": int(os.environ["RANK"]), "world_size": RANKS, "init_method": f"file://{folder / 'meeting'}"}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **place)
    run = Run(folder)
    for name, check in CHECKS.items():
        try:
            check(run)
        except (Exception, pytest.fail.Exception):
            (folder / f"{name}.{run.rank}").write_text(traceback.format_exc())
        else:
            (folder / f"{name}.{run.rank}.passed").touch()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
