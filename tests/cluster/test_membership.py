"""Membership's promises, one by one, and then under thousands of random courses of events."""

from __future__ import annotations

import random

import pytest
from membership_world import FINGERPRINT, World

from shoal.cluster.membership import Membership
from shoal.cluster.membership_events import (
    MEMBERS,
    PLACE,
    SUCCESSOR,
    Arrived,
    Disconnected,
    Entered,
    Rules,
    Send,
    Tick,
    event_of,
)
from shoal.cluster.views import View, ViewMember
from shoal.errors import CoordinatorError, PlanError


def running(**rules: float) -> World:
    """Three members a, b, c (seats 0, 1, 2) that train in view 1."""
    world = World(**rules)  # type: ignore[arg-type]
    world.come("a", "b", "c")
    world.enter()
    return world


# -- views


def test_a_view_survives_its_document_and_knows_ranks() -> None:
    members = (ViewMember(seat=1, node="x", store="x:1"), ViewMember(seat=4, node="y", store="y:1"))
    view = View(run="r", epoch=3, members=members, planned=True, cause="seat 4 joins")
    assert View.from_plain(view.to_plain()) == view
    assert [view.rank_of(seat) for seat in (1, 4, 2)] == [0, 1, None]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epoch": "3"}, "epoch"),
        ({"epoch": 0}, "epoch 0"),
        ({"members": []}, "seats"),
        ({"members": [{"seat": 1, "node": "x", "store": "x:1"}] * 2}, "seats"),
        ({"members": [{"seat": 1, "node": "x"}]}, "members.0.store"),
        ({"other": 1}, "other"),
    ],
)
def test_a_document_that_is_no_view_is_refused(change: dict[str, object], told: str) -> None:
    member = ViewMember(seat=1, node="x", store="x:1")
    document = View(run="r", epoch=3, members=(member,), planned=True, cause="").to_plain() | change
    with pytest.raises(CoordinatorError, match=told):
        View.from_plain(document)


@pytest.mark.parametrize(
    "document", [{"kind": "beat"}, {"kind": "bear"}, {}, {"kind": "beat", "epoch": 1, "step": True}]
)
def test_a_document_outside_the_protocol_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(CoordinatorError):
        event_of(document, "a")


def test_a_connection_speaks_for_one_member_and_begins_with_hello() -> None:
    with pytest.raises(CoordinatorError, match="on the connection of 'a'"):
        event_of({"kind": "leaving", "member": "b"}, "a")
    with pytest.raises(CoordinatorError, match="expected 'hello'"):
        event_of({"kind": "leaving", "member": "b"})
    assert event_of({"kind": "entered", "epoch": 2}, "a") == Entered(member="a", epoch=2)


def test_rules_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(PlanError, match="3 members at least, 2 expected"):
        Rules(run="r", expected=2, min_nodes=3, max_nodes=4)


# -- the start


def test_the_first_view_is_made_when_all_expected_are_there() -> None:
    world = World(expected=3)
    world.come("a")
    world.come("b")
    assert world.views == []
    assert world.members["a"].told("waiting")[-1] | {"reason": ""} == {
        "kind": "waiting", "what": "members", "reason": "", "have": 2, "need": 3,
    }  # fmt: skip
    world.come("c")
    assert (world.view.epoch, world.view.planned, world.view.cause, world.seats()) == (1, False, "start", [0, 1, 2])
    assert all(member.view == world.view for member in world.members.values())


def test_fewer_than_expected_start_when_they_have_waited_long_enough() -> None:
    world = World(expected=3, least=2, form_s=20.0)
    world.come("a", "b")
    world.wait(19.5)
    assert world.views == []
    world.wait(1.0)
    assert world.seats() == [0, 1]


def test_seats_are_the_members_wish_or_the_lowest_free_number() -> None:
    world = World(expected=4)
    world.come("a", seat=1)
    world.come("b", "c")
    assert [world.members[name].seat for name in "abc"] == [1, 0, 2]
    world.lose("b")
    world.come("d")
    assert world.members["d"].seat == 0


# -- loss


def test_a_broken_connection_makes_a_view_at_once() -> None:
    world = running()
    world.lose("b")
    assert (world.view.epoch, world.view.planned, world.seats()) == (2, False, [0, 2])
    assert world.view.cause == "seat 1 on node-b: its connection broke"


def test_a_silent_member_is_lost_when_its_lease_ends() -> None:
    world = running(lease_s=5.0)
    world.members["c"].silent = True
    world.wait(4.75)
    assert world.view.epoch == 1
    world.wait(0.5)
    assert world.seats() == [0, 1]
    assert world.view.cause.startswith("seat 2 on node-c: silent for 5.")
    assert not world.members["c"].connected


def test_a_launcher_that_saw_a_process_end_is_believed() -> None:
    world = running()
    world.ended(seat=0, how="exit code 1")
    assert world.seats() == [1, 2]
    assert world.view.cause == "seat 0 on node-a: exit code 1"


def test_losses_in_one_moment_make_one_view_and_later_ones_the_next() -> None:
    world = World(expected=4, least=1)
    world.come("a", "b", "c", "d")
    world.lose("a", "b")
    assert (world.view.epoch, world.seats()) == (2, [2, 3])
    world.lose("c")  # nobody has entered view 2 yet
    assert (world.view.epoch, world.seats()) == (3, [3])


def test_too_few_survivors_wait_for_others_to_come() -> None:
    world = running(least=2)
    world.lose("a", "b")
    assert world.view.epoch == 1
    assert world.members["c"].told("waiting")[-1]["have"] == 1
    world.come("d")
    assert (world.view.epoch, world.seats(), world.view.planned) == (2, [0, 2], False)


def test_a_survivor_that_dies_while_too_few_are_left_is_not_waited_for() -> None:
    world = running(least=2)
    world.lose("a", "b")
    world.lose("c")
    world.come("d", "e")
    assert (world.view.epoch, world.seats()) == (2, [0, 1])


def test_a_lost_member_that_comes_back_is_a_newcomer() -> None:
    world = running()
    world.members["b"].silent = True
    world.wait(6.0)
    world.enter()
    assert world.seats() == [0, 2]
    world.come("b")
    assert (world.seats(), world.view.planned) == ([0, 1, 2], True)
    assert world.members["b"].view == world.view


# -- broken exchanges


def test_a_broken_exchange_waits_for_the_loss_that_explains_it() -> None:
    world = running()
    world.fail_exchange("a")
    world.wait(2.0)
    assert world.view.epoch == 1
    world.lose("b")
    assert (world.view.epoch, world.view.cause) == (2, "seat 1 on node-b: its connection broke")
    world.wait(10.0)
    assert world.view.epoch == 2


def test_a_broken_exchange_that_nothing_explains_makes_a_view_after_a_while() -> None:
    world = running(settle_s=3.0)
    world.fail_exchange("b")
    world.wait(2.5)
    assert world.view.epoch == 1
    world.wait(1.0)
    assert (world.view.epoch, world.view.planned, world.seats()) == (2, False, [0, 1, 2])
    assert world.view.cause == "seat 1 on node-b could not exchange: connection reset"


def test_a_broken_exchange_of_all_makes_a_view_at_once() -> None:
    world = running()
    world.fail_exchange("c", "a")
    assert world.view.epoch == 1
    world.fail_exchange("b")
    assert world.view.epoch == 2


def test_what_names_an_older_view_is_ignored_and_counted() -> None:
    world = running()
    world.lose("b")
    world.fail_exchange("a", "c", epoch=1)
    world.wait(10.0)
    assert world.view.epoch == 2
    assert world.machine.status()["stale"]["broken"] == 2


def test_an_exchange_that_breaks_while_a_planned_view_is_prepared_cancels_it() -> None:
    world = running(settle_s=1.0)
    world.come("d")
    world.fail_exchange("a")  # in view 1, where a, b and c still train
    world.wait(2.0)
    assert (world.view.epoch, world.view.planned, world.seats()) == (3, False, [0, 1, 2, 3])


def test_who_breaks_in_the_view_before_and_then_enters_the_next_waits_for_nothing() -> None:
    world = running(settle_s=60.0)
    world.come("d")
    world.fail_exchange("a")
    world.enter()
    assert world.state == "running"
    world.wait(70.0)
    assert world.view.epoch == 2


# -- coming and going


def test_a_newcomer_enters_by_a_planned_view_and_the_next_waits_its_turn() -> None:
    world = running(most=5)
    world.come("d")
    assert (world.view.epoch, world.view.planned, world.seats()) == (2, True, [0, 1, 2, 3])
    assert world.view.cause == "seat 3 joins"
    world.come("e")
    world.enter("a", "b", "c")
    assert world.view.epoch == 2
    world.enter("d")
    assert (world.view.epoch, world.seats()) == (3, [0, 1, 2, 3, 4])
    assert world.members["e"].told("waiting")


def test_a_loss_cancels_a_planned_view_and_takes_its_newcomers_in() -> None:
    world = running()
    world.come("d")
    world.enter("a")
    world.lose("b")
    assert (world.view.epoch, world.view.planned, world.seats()) == (3, False, [0, 2, 3])


def test_nobody_enters_a_full_view_until_there_is_room() -> None:
    world = running(most=3)
    world.come("d")
    world.wait(1.0)
    assert world.view.epoch == 1
    told = world.members["d"].told("waiting")[-1]
    assert "all 3 places are taken" in told["reason"]
    assert told["what"] == PLACE
    world.lose("a")
    assert world.seats() == [1, 2, 3]


def test_what_is_waited_for_tells_whether_others_train_meanwhile() -> None:
    world = running(least=3, most=3)
    world.come("d")
    assert world.members["d"].told("waiting")[-1]["what"] == PLACE
    world.leave("d")
    world.lose("c")
    assert world.members["a"].told("waiting")[-1]["what"] == MEMBERS
    world.come("e")
    assert world.members["e"].view == world.view
    assert world.members["d"].view is None, "who is leaving does not come in any more"
    world.leave("a")
    world.enter()
    assert world.members["a"].told("waiting")[-1]["what"] == SUCCESSOR


def test_who_leaves_goes_by_a_planned_view() -> None:
    world = running()
    world.leave("b")
    assert (world.view.planned, world.view.cause, world.seats()) == (True, "seat 1 leaves", [0, 2])
    assert world.members["b"].view == world.view
    world.enter("a")
    world.lose("b")  # done: no loss
    world.enter("c")
    world.wait(10.0)
    assert world.view.epoch == 2


def test_who_leaves_is_kept_while_too_few_would_be_left() -> None:
    world = World(expected=2, least=2)
    world.come("a", "b")
    world.enter()
    world.leave("b")
    assert world.view.epoch == 1
    assert world.members["b"].told("waiting")
    world.come("c")
    assert (world.seats(), world.view.cause) == ([0, 2], "seat 2 joins, seat 1 leaves")


def test_a_loss_before_the_hand_over_is_done_keeps_who_leaves() -> None:
    world = running(least=1)
    world.leave("b")
    world.lose("a")
    assert (world.view.epoch, world.view.planned, world.seats()) == (3, False, [1, 2])
    world.enter()
    assert (world.view.epoch, world.view.planned, world.seats()) == (4, True, [2])


def test_the_last_member_hands_over_before_it_goes() -> None:
    world = World(expected=1, least=1, most=2)
    world.come("a")
    world.enter()
    world.leave("a")
    world.come("b")
    assert world.seats() == [0, 1]  # together first
    world.enter()
    assert world.seats() == [1]


def test_a_leaver_that_dies_during_its_hand_over_explains_a_broken_exchange() -> None:
    world = running(settle_s=60.0)
    world.leave("b")
    world.lose("b", how="killed by SIGKILL")
    assert world.view.epoch == 2
    world.fail_exchange("a")
    assert (world.view.epoch, world.view.planned, world.seats()) == (3, False, [0, 2])
    assert "seat 1 on node-b left early: killed by SIGKILL" in world.view.cause


# -- the end


def test_when_one_has_finished_nobody_is_waited_for_any_more() -> None:
    world = running()
    world.come("d", seat=7)
    world.finish("a")
    world.lose("a")
    world.come("e")
    assert world.members["e"].told("end")[0] | {"reason": ""} == {"kind": "end", "reason": "", "failed": False}
    world.lose("b")
    assert not world.members["c"].told("end")
    world.finish("c")
    assert world.members["c"].told("end") == [{"kind": "end", "reason": "100 steps", "failed": False}]
    assert world.members["d"].told("end")
    world.wait(20.0)
    assert world.view.epoch == 2


def test_who_cannot_exchange_with_one_that_has_finished_is_told_the_end() -> None:
    world = running()
    world.finish("a")
    world.lose("a")
    world.fail_exchange("b", "c")
    assert world.members["b"].told("end")


def test_one_failure_ends_the_run_for_all() -> None:
    world = running()
    world.come("d")
    world.fail("b")
    ends = [member.told("end") for member in world.members.values()]
    assert ends == [[{"kind": "end", "reason": "seat 1 on node-b failed: no space left", "failed": True}]] * 4
    world.lose("a")
    world.come("e")
    assert world.members["e"].told("end")
    assert world.view.epoch == 2


# -- who may come in


def test_a_wrong_fingerprint_is_refused_by_name() -> None:
    world = running()
    world.come("d", fingerprint=FINGERPRINT | {"plan": "xyz"})
    assert "its plan is xyz, the other members' is abc" in world.members["d"].told("refused")[0]["reason"]
    assert not world.members["d"].connected
    world.come("e", fingerprint={"plan": "abc"})
    assert "its job is None" in world.members["e"].told("refused")[0]["reason"]
    assert world.view.epoch == 1


def test_another_runs_member_is_refused() -> None:
    world = running()
    world.come("d", run="other")
    assert "run r's, and not other's" in world.members["d"].told("refused")[0]["reason"]


def test_a_member_that_knows_a_later_view_is_refused() -> None:
    world = running()
    world.come("d", epoch=7)
    assert "knows view 7, but this coordinator only reached 1" in world.members["d"].told("refused")[0]["reason"]


def test_a_seat_is_held_by_one_living_member() -> None:
    world = running()
    world.come("d", seat=1)
    assert "seat 1 is held by a member on node-b" in world.members["d"].told("refused")[0]["reason"]
    world.lose("b")
    world.enter()
    world.come("e", seat=1)
    assert world.seats() == [0, 1, 2]


# -- the coordinator's own misfortunes


def test_a_restarted_coordinator_takes_its_members_back_without_a_new_view() -> None:
    world = running()
    world.restart()
    world.come("b", "a")
    assert world.state == "recovering"
    world.come("c")
    assert world.state == "running"
    world.wait(10.0)
    assert world.view.epoch == 1
    assert [m.seat for m in world.members.values()] == [0, 1, 2]


def test_who_does_not_come_back_after_a_restart_is_lost() -> None:
    world = running()
    world.restart()
    world.come("a", "c")
    world.wait(4.0)
    assert world.view.epoch == 1
    world.wait(1.5)
    assert (world.view.epoch, world.seats()) == (2, [0, 2])
    assert world.view.cause == "seat 1 on node-b: did not come back after the coordinator restarted"


def test_a_view_recorded_but_not_sent_is_sent_after_the_restart() -> None:
    world = running()
    world.members["b"].connected, world.members["b"].over = False, "killed"
    world.do(Disconnected(member="b"), deliver=False)
    world.restart()
    world.come("a", "c")
    assert world.view.epoch == 2
    assert world.members["a"].epoch == world.members["c"].epoch == 2


def test_newcomers_wait_for_the_recovery_and_take_nobodys_seat() -> None:
    world = running()
    world.restart()
    world.come("d")
    world.come("e", seat=1)
    world.come("a", "b", "c")
    assert world.members["d"].seat == 3
    assert world.members["e"].told("refused")
    assert world.seats() == [0, 1, 2, 3]


def test_a_restart_before_the_first_view_keeps_seats() -> None:
    world = World(expected=3)
    world.come("a", "b")
    world.restart()
    world.come("c")
    world.come("b", "a")
    assert [world.members[name].seat for name in "abc"] == [0, 1, 2]
    assert world.seats() == [0, 1, 2]


def test_the_end_survives_a_restart() -> None:
    world = running()
    world.finish("a")
    world.restart()
    world.come("a", "b", "c")
    world.finish("b")
    world.finish("c")
    assert world.members["a"].told("end")
    world.restart()
    world.come("d")
    assert world.members["d"].told("end")


def test_another_runs_log_is_refused() -> None:
    world = running()
    with pytest.raises(CoordinatorError, match="log of run r, and not of other"):
        Membership(Rules(run="other", expected=1, min_nodes=1, max_nodes=1), now=0.0).restore(world.records, 0.0)


def test_a_coordinator_that_was_stopped_itself_blames_nobody() -> None:
    world = running()
    world.members["c"].silent = True
    world.wait(2.0)
    world.now += 60.0
    world.do(Tick())
    world.wait(2.5)
    assert world.view.epoch == 1
    world.wait(1.0)
    assert world.seats() == [0, 1]


def test_a_second_connection_of_a_member_replaces_the_first() -> None:
    world = running()
    world.members["a"].connected = False  # as the member knows, and the coordinator does not yet
    world.come("a")
    world.wait(10.0)
    assert world.view.epoch == 1


def test_the_same_events_give_the_same_instructions() -> None:
    def play() -> list[object]:
        machine = Membership(Rules(run="r", expected=1, min_nodes=1, max_nodes=2), now=0.0)
        hello = {"run": "r", "seat": None, "node": "n", "store": "n:1", "fingerprint": {}, "epoch": 0, "step": -1}
        events = [Arrived(member=name, **hello) for name in "ab"]  # type: ignore[arg-type]
        return [machine.handle([event], float(i)) for i, event in enumerate(events)]

    assert play() == play()
    assert isinstance(play()[0], list)
    assert any(isinstance(instruction, Send) for instruction in play()[0])  # type: ignore[attr-defined]


# -- chance


@pytest.mark.parametrize("block", range(8))
def test_whatever_happens_views_are_sound_and_all_who_live_end_in_one(block: int) -> None:
    num_views = num_ended = 0
    for seed in range(block * 300, block * 300 + 300):
        dice = random.Random(seed)
        least = dice.randint(1, 3)
        expected = dice.randint(least, 4)
        world = World(
            expected=expected,
            least=least,
            most=dice.randint(expected, 6),
            settle_s=dice.choice([0.0, 1.0, 5.0]),
            form_s=10,
        )
        try:
            for _ in range(dice.randint(10, 120)):
                world.something(dice)
            world.calm()
            check_end(world)
        except BaseException:
            print("seed", seed, world.rules, world.causes, world.machine.status())
            raise
        num_views += len(world.views)
        num_ended += world.over
    assert num_views > 800  # the courses are not trivial
    assert num_ended < 150


def check_end(world: World) -> None:
    """Everybody has had time: all who live are in the newest view, as many as may be, or were told the end."""
    living = {m.seat: m for m in world.members.values() if m.connected}
    if world.over:
        assert all(member.over == "end" for member in living.values())
        return
    staying = [seat for seat, member in living.items() if not member.leaving]
    if len(living) < world.rules.min_nodes:
        assert world.state in ("forming", "short")
        return
    if not staying:
        return
    wanted = max(min(len(staying), world.rules.max_nodes), world.rules.min_nodes)
    if world.views or len(staying) >= world.rules.min_nodes:
        assert len(world.seats()) == wanted, (world.seats(), staying)
        assert set(world.seats()) <= set(living)
        assert world.state == "running"
        for seat in world.seats():
            assert living[seat].view == world.view  # type: ignore[index]
