"""Who is in the next view, and what the others wait for: pure functions of who attends and of the view at hand."""

from __future__ import annotations

from shoal.cluster.membership_events import MEMBERS, PLACE, SUCCESSOR, Rules, Waiting
from shoal.cluster.roster import Attendee, Roster
from shoal.cluster.transition import Transition


def first_members(roster: Roster, rules: Rules, *, late: bool) -> list[Attendee] | None:
    """The first view's members, or None while more are waited for. `late`: it has been waited long enough."""
    ready = [a for a in roster if not a.leaving]
    enough = len(ready) >= (rules.min_nodes if late else rules.expected)
    return ready[: rules.max_nodes] if enough else None


def survivors(roster: Roster, at_hand: Transition, rules: Rules) -> tuple[list[Attendee], str] | None:
    """All who live, and why they form a view; None if they are too few.

    Those who hold the training's state come before those who wait to come in.
    """
    living = [a for a in roster if a.member in at_hand.current]
    living += [a for a in roster if at_hand.hands_over(a)]
    living += [a for a in roster if not a.leaving and a.member not in at_hand.current]
    if len(living) < rules.min_nodes:
        return None
    cause = "; ".join(at_hand.losses) or at_hand.left_early or at_hand.broken(roster)[0].broken
    return living[: rules.max_nodes], cause


def changed(roster: Roster, at_hand: Transition, rules: Rules) -> tuple[list[Attendee], str] | None:
    """The members once all who want to have come and gone, and what changes; None if nothing does."""
    current = [a for a in roster if a.member in at_hand.current]
    staying = [a for a in current if not a.leaving]
    going = [a for a in current if a.leaving]
    joining = [a for a in roster if a.member not in at_hand.current and not a.leaving]
    joining = joining[: rules.max_nodes - len(staying)]
    # Without anybody who stays, a leaver must: somebody has to hand the training's state to those who join.
    short = max(rules.min_nodes - len(staying) - len(joining), 0 if staying else 1)
    short = min(short, rules.max_nodes - len(staying) - len(joining), len(going))
    kept = going[len(going) - short :]
    members = staying + joining + kept
    if {a.member for a in members} == at_hand.current:
        return None
    changes = [f"seat {a.seat} joins" for a in joining] + [f"seat {a.seat} leaves" for a in going if a not in kept]
    return members, ", ".join(changes)


def waits_for(attendee: Attendee, roster: Roster, at_hand: Transition, rules: Rules) -> Waiting | None:
    """What `attendee` waits for, or None if it does not."""
    num_living = sum(not a.leaving or at_hand.takes_part(a) for a in roster)
    if at_hand.view is None:
        return Waiting(MEMBERS, "waiting for the run's members to come", num_living, rules.expected)
    if at_hand.losses:
        lost = "; ".join(at_hand.losses)
        return Waiting(MEMBERS, f"too few members are left: {lost}", num_living, rules.min_nodes)
    if at_hand.takes_part(attendee):
        stuck = attendee.leaving and at_hand.entered_by_all and not at_hand.broken(roster)
        if not stuck:
            return None
        return Waiting(SUCCESSOR, "nobody is there to take its place", num_living, rules.min_nodes + 1)
    if len(at_hand.current) >= rules.max_nodes:
        return Waiting(PLACE, f"all {rules.max_nodes} places are taken")
    return Waiting(PLACE, f"waiting until view {at_hand.epoch} is entered by all")
