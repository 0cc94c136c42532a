"""Who gives state to whom when a view begins."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoal.engine.views.standing import Standing, digest_of, roles, roles_apart

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
