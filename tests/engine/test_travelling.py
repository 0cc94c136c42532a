"""In which pieces a state travels, and when: nothing is left out, nothing goes twice."""

from __future__ import annotations

import time
from typing import cast

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.engine.memories import copy_range, pieces_of
from shoal.engine.views.standing import Roles
from shoal.engine.views.travelling import Giving
from shoal.wire.group import Group


@given(total=st.integers(0, 40 << 20), count=st.integers(1, 5))
def test_the_givers_pieces_make_up_the_whole(total: int, count: int) -> None:
    pieces = [piece for index in range(count) for piece in pieces_of(total, index, count)]
    place = 0
    for piece in pieces:
        assert piece.start == place
        assert len(piece) > 0
        place = piece.stop
    assert place == total


@given(sizes=st.lists(st.integers(0, 50), max_size=6), data=st.data())
def test_any_range_of_bytes_comes_out_as_it_went_in(sizes: list[int], data: st.DataObject) -> None:
    memories = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    whole = torch.cat([*memories, torch.empty(0, dtype=torch.uint8)])
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    message = torch.zeros(stop - start, dtype=torch.uint8)
    copy_range(memories, range(start, stop), message, into=False)
    assert torch.equal(message, whole[start:stop])
    empty = [torch.zeros_like(memory) for memory in memories]
    copy_range(empty, range(start, stop), message, into=True)
    back = torch.cat([*empty, torch.empty(0, dtype=torch.uint8)])
    assert torch.equal(back[start:stop], whole[start:stop])
    assert not back[:start].any()
    assert not back[stop:].any()


class Wire:
    """Counts what is sent; everything arrives at once."""

    def __init__(self) -> None:
        self.sent = 0

    def send(self, message: Tensor, to: int) -> Wire:
        """Begin to send."""
        self.sent += 1
        return self

    def wait(self) -> None:
        """It has arrived."""


def sends_just(wire: Wire, pieces: int) -> bool:
    """Whether so many pieces leave, and then no more."""
    deadline = time.monotonic() + 30
    while wire.sent < pieces and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    return wire.sent == pieces


def test_state_makes_way_for_gradients_and_yet_arrives_within_some_steps() -> None:
    wire = Wire()
    state = [torch.zeros(32 << 20)]  # 128 MiB: 32 pieces of 4
    giving = Giving(cast(Group, wire), state, Roles(0, [0], [1], []), 0)
    giving.make_way()
    giving.begin()
    assert sends_just(wire, 4), "an eighth of them whatever is on the wires"
    giving.go_on()
    assert sends_just(wire, 32), "nothing is on the wires: everything leaves"


def test_state_that_never_finds_the_wires_free_takes_eight_steps() -> None:
    wire = Wire()
    giving = Giving(cast(Group, wire), [torch.zeros(32 << 20)], Roles(0, [0], [1], []), 0)
    giving.make_way()
    giving.begin()
    for step in range(1, 9):
        assert sends_just(wire, 4 * step)
        giving.make_way()
