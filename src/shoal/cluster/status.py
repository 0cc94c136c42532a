"""What a person or a launcher may see of membership, as one document."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.cluster.roster import Attendee, Roster
from shoal.cluster.transition import Transition
from shoal.cluster.views import Document

_SHOWN = ("member", "seat", "node", "store", "attached", "step", "entered", "leaving", "finished")


def status_of(
    roster: Roster, at_hand: Transition, *, finishing: bool, end: Document | None, stale: Mapping[str, int]
) -> Document:
    """The document.

    `state` is one word: forming, running, entering, broken, short, recovering, finishing, ended or failed; `view` the
    newest view or null; `members` its members that are here, `waiting` all others; `stale` counts by kind what named an
    older view; `end` is what all were told at the end.
    """
    return {
        "run": roster.rules.run,
        "state": _state(roster, at_hand, finishing=finishing, end=end),
        "epoch": at_hand.epoch,
        "members": [_show(attendee) for attendee in roster if attendee.member in at_hand.current],
        "waiting": [_show(attendee) for attendee in roster if attendee.member not in at_hand.current],
        "view": at_hand.view.to_plain() if at_hand.view else None,
        "stale": dict(stale),
        "end": end,
    }


def _state(roster: Roster, at_hand: Transition, *, finishing: bool, end: Document | None) -> str:
    if end is not None:
        return "failed" if end["failed"] else "ended"
    if finishing:
        return "finishing"
    if roster.recovering:
        return "recovering"
    if at_hand.view is None:
        return "forming"
    if at_hand.losses:
        return "short"
    if at_hand.broken(roster):
        return "broken"
    return "running" if at_hand.entered_by_all else "entering"


def _show(attendee: Attendee) -> Document:
    return {name: getattr(attendee, name) for name in _SHOWN}
