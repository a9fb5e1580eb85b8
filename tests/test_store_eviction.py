"""What a full prefix store evicts, and whether a plan loads or replays: pure functions, and the store asking them."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv.store import prefix_store, upkeep
from hf_seqkv.store.eviction import Candidate, victims, worth
from hf_seqkv.store.keys import scope_key
from hf_seqkv.store.planner import Rates, observe, plan
from hf_seqkv.store.prefix_store import PrefixStore

SCOPE = scope_key(model="tests")
WORTHS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])


@st.composite
def tries(draw):
    """Entries whose parents come before them, or are missing."""
    keys = [bytes([n + 1]) for n in range(draw(st.integers(0, 12)))]
    parents = [draw(st.sampled_from([b"", b"gone", *keys[:n]])) for n in range(len(keys))]
    return [Candidate(*pair, draw(st.integers(1, 9)), draw(WORTHS)) for pair in zip(keys, parents, strict=True)]


@given(tries(), st.integers(-3, 40), st.integers(0, 10), WORTHS | st.just(math.inf), st.data())
def test_victims(entries, least, more, limit, data):
    parent = data.draw(st.sampled_from([b"", *(entry.key for entry in entries)]))
    rows, kept = {entry.key: entry for entry in entries}, set()
    while parent in rows:
        kept.add(parent)
        parent = rows[parent].parent
    newcomer = next(iter(sorted(kept, reverse=True)), b"")
    gone = victims(entries, least, least + more, limit, newcomer)
    # What may go at all: whole subtrees worth less than the newcomer, without those it follows.
    children = {key: [entry.key for entry in entries if entry.parent == key] for key in rows}

    def may_go(key):
        return key not in kept and rows[key].worth < limit and all(map(may_go, children[key]))

    room = sum(rows[key].size for key in rows if may_go(key))
    assert (gone is None) is (room < least)
    left, freed = dict(rows), 0
    for key in gone or []:
        assert freed < least + more
        assert may_go(key)
        leaves = [k for k in left if k not in kept and not any(c in left for c in children[k])]
        assert key in leaves
        assert left[key].worth == min(left[k].worth for k in leaves)
        freed += left.pop(key).size
    if gone is not None:
        assert freed >= min(least + more, room)


def test_worth():
    assert worth(0, 0.0, 0.0, 60.0) == 1.0
    assert worth(0, 2.0, 60.0, 60.0) == 0.125
    assert worth(3, 0.0, 120.0, 60.0) == 1.0
    assert worth(0, None, -5.0, 60.0) == worth(0, 4.5, 0.0, 60.0)
    assert worth(0, 1e6 - 1, 1e12, 1.0) == 0.0
    # Predictable text outlives surprising text, until that one is used.
    assert worth(0, 1.0, 60.0, 60.0) > worth(0, 5.0, 0.0, 60.0)
    assert worth(1, 5.0, 0.0, 60.0) > worth(0, 0.1, 0.0, 60.0)


def fill(store, count, bits=4.0, parent=b"", first=0):
    """Put a chain of pages of 1,000 bytes and more; returns keys."""
    keys = []
    for n in range(first, first + count):
        parent = store.put(SCOPE, parent, [n], bytes(1000), form="exact", bits=bits)
        keys.append(parent)
    return keys


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the store takes for now."""
    now = SimpleNamespace(at=1e9)
    for module in (prefix_store, upkeep):
        monkeypatch.setattr(module.time, "time", lambda: now.at)
    return now


def test_a_budget_is_kept(tmp_path, clock):
    with PrefixStore(tmp_path, max_bytes=10_000, half_life=60.0) as store:
        for first in range(0, 400, 100):
            clock.at += 30
            assert all(fill(store, 3, first=first))
        assert sum(row.bytes for row in store.entries()) <= 10_000
        assert len(store.find(SCOPE, [[300], [301], [302]])) == 3
        # Tails went first, the oldest chain's before others'.
        assert [len(store.find(SCOPE, [[n], [n + 1], [n + 2]])) for n in (0, 100, 200)] == [0, 2, 3]


def test_surprising_text_does_not_push_out_predictable(tmp_path, clock):
    with PrefixStore(tmp_path, max_bytes=4000) as store:
        old = fill(store, 3, bits=1.0)
        assert fill(store, 1, bits=6.0, first=50) == [None]
        assert store.find(SCOPE, [[0], [1], [2]]) == old
        assert fill(store, 1, bits=0.5, first=60) != [None]
        assert store.find(SCOPE, [[0], [1], [2]]) == old[:2]


def test_a_page_does_not_push_out_those_before_it(tmp_path, clock):
    with PrefixStore(tmp_path, max_bytes=3600, half_life=1.0) as store:
        keys = fill(store, 3)
        clock.at += 1000
        assert store.put(SCOPE, keys[-1], [9], bytes(1000), form="exact", bits=0.0) is None
        assert store.find(SCOPE, [[0], [1], [2]]) == keys
        assert store.put(SCOPE, keys[0], [9], bytes(1000), form="exact", bits=0.0) is not None
        assert store.find(SCOPE, [[0], [1], [2]]) == keys[:2]
        assert store.put(SCOPE, b"", [10], bytes(4000), form="exact", bits=0.0) is None


def test_prune(tmp_path, clock):
    with PrefixStore(tmp_path) as store:
        keys = fill(store, 4)
        report = store.prune(2500)
        assert store.find(SCOPE, [[n] for n in range(4)]) == keys[:2]
        size = report["bytes"] // 2
        assert report == {"removed": 2, "freed": 2 * size, "entries": 2, "bytes": 2 * size, "temporaries": 0}
        assert store.prune(10_000)["removed"] == 0


# Plans.

SECONDS = st.floats(1e-6, 10.0)
SLOPES = SECONDS | st.just(0.0)
RUNS = st.lists(st.tuples(st.integers(1, 999), st.integers(0, 9999)), min_size=2)


@given(
    st.integers(0, 9), st.integers(1, 8), st.integers(1, 60), SECONDS, SECONDS | st.just(0.0), SECONDS | st.just(0.0)
)
def test_plans_are_the_best(pages, size, tokens, load, token, slope):
    made = plan(pages, size, tokens, Rates({"hot": load}, (token, slope)))

    def seconds(count):
        each = sum(token + slope * (at + 0.5) for at in range(count * size, tokens))
        return count * load + each

    most = min(pages, (tokens - 1) // size)
    if most == 0:
        assert (made.load, made.seconds) == (0, None)
    else:
        assert 0 <= made.load <= most
        assert made.seconds == pytest.approx(seconds(made.load), rel=1e-6)
        assert made.seconds <= min(map(seconds, range(most + 1))) * (1 + 1e-6)
        assert made.prefill_seconds == pytest.approx(seconds(0), rel=1e-6)


def test_plans_say_why():
    assert "not been measured" in plan(3, 64, 300, Rates({}, (1.0, 0.0))).why
    assert plan(3, 64, 300, Rates({"hot": 1.0}, None)).load == 3
    quick = Rates({"hot": 0.01, "sequence": 50.0}, (0.01, 0.0))
    assert plan(3, 64, 300, quick, "hot").why == (
        "loading 3 pages and prefilling 108 tokens: 1.11 s, where prefilling all 300 would take 3 s"
    )
    assert plan(3, 64, 300, quick, "sequence").why == (
        "prefilling all 300 tokens: 3 s, where loading 3 pages and prefilling the rest would take 151 s"
    )
    assert plan(3, 64, 300, quick).load == 0
    assert "not been measured" in plan(3, 64, 300, quick, "exact").why


@given(
    st.floats(1e-5, 1e-1),
    st.floats(0, 1e-4),
    st.lists(st.tuples(st.integers(1, 999), st.integers(0, 9999)), min_size=2),
)
def test_rates_are_recovered(token, slope, runs):
    sums = None
    for count, context in runs:
        mean = context + count / 2
        sums = observe(sums, count, count * (token + slope * mean), mean)
    a, b = Rates.fit({"prefill": sums}).prefill
    contexts = [context + count / 2 for count, context in runs]
    mean, square = sums[1] / sums[0], sums[2] / sums[0]
    assert a + b * mean == pytest.approx(token + slope * mean, rel=1e-6)
    if square - mean**2 > 2e-6 * square:  # contexts that are nearly alike do not tell the slope
        for mean in (min(contexts), max(contexts)):
            assert a + b * mean == pytest.approx(token + slope * mean, rel=1e-3)
    assert min(a, b) >= 0


def test_recent_rates_count_more_and_stay(tmp_path):
    with PrefixStore(tmp_path) as store:
        assert store.rates() == Rates({}, None)
        store.note_rate("exact", 10, 1.0)
        for _ in range(50):
            store.note_rate("exact", 10, 2.0)
        store.note_rate("prefill", 100, 1.0)
    with PrefixStore(tmp_path) as store:
        assert store.rates().load == {"exact": pytest.approx(0.2, rel=0.01)}
        assert store.rates().prefill == (pytest.approx(0.01), 0.0)
