"""The table of tokens that are held dense, by itself."""

import copy

import torch

from hf_seqkv.integration.held import HeldTokens


def some(*slots, salt=0):
    """Keys and values whose every number tells the slot."""
    slots = torch.tensor(slots)
    k = (slots + salt).float()[None, :, None].expand(2, -1, 3)
    return k, -k[..., :2], slots


def empty(rows=2):
    return HeldTokens(torch.zeros(rows, 2, 5, 3), torch.zeros(rows, 2, 5, 2))


def shown(held, row):
    """Slots that a row's table shows, each checked against its keys and values."""
    found = held.table()
    if found is None:
        return []
    slots = found.slots[row]
    for j in (slots >= 0).nonzero()[:, 0]:
        assert (found.k[row, :, j] == slots[j]).all()
        assert (found.v[row, :, j] == -slots[j]).all()
    return slots[slots >= 0].tolist()


def test_chosen_tokens_are_held():
    held = empty()
    assert held.table() is None
    held.add(1, *some(4, 5, 6, 7), torch.tensor([True, False, False, True]))
    assert shown(held, 0) == []
    assert shown(held, 1) == [4, 7]
    assert held.table().k.dtype == torch.bfloat16
    slots = held.slots
    held.add(0, *some(4, 5), torch.tensor([False, False]))
    assert shown(held, 0) == []
    assert held.slots is slots  # nothing was chosen: nothing is copied


def test_room_grows_and_keeps_what_there_is():
    held = empty()
    for slot in range(100):
        held.add(slot % 2, *some(slot), torch.tensor([True]))
    assert [shown(held, row) for row in range(2)] == [list(range(row, 100, 2)) for row in range(2)]
    assert held.slots.shape[1] <= 2 * 50


def test_tokens_outside_are_forgotten():
    held = empty()
    for row in range(2):
        held.add(row, *some(3, 8, 9, 15), torch.ones(4, dtype=torch.bool))
    held.keep(0, 8, 15)
    assert shown(held, 0) == [8, 9]
    assert shown(held, 1) == [3, 8, 9, 15]
    held.keep(0, 100, 200)
    assert shown(held, 0) == []


def test_parked_tokens_return():
    held = empty()
    held.add(0, *some(0, 3, 8, 9), torch.ones(4, dtype=torch.bool))
    held.park(0, 3)
    assert shown(held, 0) == [0]
    held.park(0, 0)
    assert shown(held, 0) == []
    held.park(0, 9)
    assert shown(held, 0) == [0, 3, 8]
    held.keep(0, 2, 10)  # parked or not
    assert shown(held, 0) == [3, 8]
    held.park(0, 10)
    assert shown(held, 0) == [3, 8, 9]


def test_rows_are_selected():
    held = empty(3)
    for row in range(3):
        held.add(row, *some(*range(row, 2 * row)), torch.ones(row, dtype=torch.bool))
    held.select(torch.tensor([2, 0, 2, 1]))
    assert [shown(held, row) for row in range(4)] == [[2, 3], [], [2, 3], [1]]
    held.add(0, *some(9), torch.tensor([True]))
    assert [shown(held, row) for row in range(4)] == [[2, 3, 9], [], [2, 3], [1]]


def test_a_table_stays_as_it_was_handed_out():
    """A step makes pages before it attends: what they take in may not show in the table it attends to."""
    for change in (
        lambda held: held.add(0, *some(20), torch.tensor([True])),
        lambda held: held.keep(1, 8, 100),
        lambda held: held.park(1, 9),
        lambda held: (held.keep(1, 8, 100), held.add(1, *some(30, 31), torch.ones(2, dtype=torch.bool))),
    ):
        held = empty()
        held.add(0, *some(3), torch.tensor([True]))
        held.add(1, *some(3, 8, 9, 15), torch.ones(4, dtype=torch.bool))
        given_ = held.table()
        before = copy.deepcopy(given_)
        change(held)
        assert torch.equal(given_.slots, before.slots)
        seen = given_.slots >= 0
        for x, y in ((given_.k, before.k), (given_.v, before.v)):
            assert torch.equal(x.transpose(1, 2)[seen], y.transpose(1, 2)[seen])


def test_bytes_are_those_of_the_tensors():
    held = empty()
    held.add(0, *some(0, 3, 8), torch.ones(3, dtype=torch.bool))
    used, room = held.bytes()
    assert used == 3 * (2 * (3 + 2) * 2 + 8)
    assert used + room == sum(x.untyped_storage().nbytes() for x in (held.k, held.v, held.slots))
