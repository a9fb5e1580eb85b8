"""Checks that every rank makes of a shared model's stored pages and sessions."""

import pytest
import torch
import torch.distributed as dist
from models import LOSSLESS, SMALL, prompt
from ranks import PAGE, RANKS, SINKS, generated, warned

from hf_seqkv import SeqKVCache
from hf_seqkv.errors import CalibrationMismatchError, FormatError, SeqKVError
from hf_seqkv.integration import learned_tables, prefix
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.shards import shard_of
from hf_seqkv.integration.state import state_of
from hf_seqkv.store.planner import Rates


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
