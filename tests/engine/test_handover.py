"""Who gives state to whom when a view begins, and in which pieces: nothing is left out, nothing goes twice."""

from __future__ import annotations

import time
from typing import cast

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.engine.handover import Giving, Roles, Standing, digest_of, roles, roles_apart
from shoal.engine.memories import copy_range, pieces_of
from shoal.wire.group import Group

SOME = st.lists(
    st.builds(Standing, step=st.integers(-1, 3), validated=st.integers(-1, 3), digest=st.integers(0, 2)),
    min_size=1,
    max_size=8,
)


@given(SOME)
def test_everybody_gives_or_takes_unless_nobody_has_anything(standings: list[Standing]) -> None:
    part = roles(standings)
    furthest = max(standing.step for standing in standings)
    if furthest == -1:
        assert part.teller is None
        assert part.givers == part.takers == []
        return
    assert sorted(part.givers + part.takers) == list(range(len(standings)))
    assert {standings[rank].step for rank in part.givers} == {furthest}, "no committed step is lost"
    assert len({standings[rank].digest for rank in part.givers}) == 1, "all givers hold the same"
    assert part.teller in part.givers
    told = standings[part.teller].validated if part.teller is not None else -1
    assert told == max(standings[rank].validated for rank in part.givers)
    assert {rank for rank in part.takers if standings[rank].step == furthest} == set(part.differing)


def test_the_majority_is_right_and_the_rest_is_named() -> None:
    standings = [Standing(7, -1, 1), Standing(7, -1, 2), Standing(7, -1, 2), Standing(6, -1, 3)]
    part = roles(standings)
    assert (part.givers, part.takers, part.differing) == ([1, 2], [0, 3], [0])


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


def test_models_that_differ_in_one_bit_have_other_digests() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    before = digest_of(model)
    assert digest_of(model) == before >= 0
    with torch.no_grad():
        model[1].weight[0, 1] = torch.nextafter(model[1].weight[0, 1], torch.tensor(9.0))
    assert digest_of(model) != before


def test_where_each_has_its_own_nobody_of_the_newest_view_is_corrected() -> None:
    part = roles_apart([Standing(5, 0, 0, 3), Standing(7, 0, 0, 3), Standing(9, 9, 0, 2), Standing(-1, -1, 0)])
    assert (part.teller, part.givers, part.takers, part.differing) == (1, [1], [2, 3], [])


def test_who_is_in_the_middle_of_a_round_tells_of_it() -> None:
    part = roles_apart([Standing(5, 5, 0, 3), Standing(5, 5, 0, 3, midway=1)])
    assert part.teller == 1


def test_nobody_gives_where_nobody_has_any() -> None:
    assert roles_apart([Standing(-1, -1, 0), Standing(-1, -1, 0)]).teller is None


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
