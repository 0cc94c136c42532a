"""What the state machine of membership is told (events) and what it answers (instructions), and its rules.

Members' events are documents on the wire: `event_of` reads one, and refuses what is not exactly that. The table
`FROM_MEMBERS` is the protocol from member to coordinator. The other way go:

| kind | fields |
|---|---|
| welcome | seat, epoch: of the coordinator |
| refused | reason; the stream then closes, and asking again will not help |
| waiting | what, reason, have, need: see `Waiting` |
| view | view |
| stop | : training is to end after the step at hand, with all that an end has |
| end | reason, failed |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from shoal.cluster.views import Document, checked
from shoal.errors import CoordinatorError, PlanError, nearest
from shoal.strict_toml import STRICT

MEMBERS, PLACE, SUCCESSOR = "members", "place", "successor"


class Waiting(NamedTuple):
    """What one waits for.

    Attributes:
        what: MEMBERS: nobody trains before more come; PLACE: others train without this one, or may; SUCCESSOR: it
            trains, and may not leave.
        have, need: how many members there are, and how many are needed; 0 where it is not for want of them.
    """

    what: str
    reason: str
    have: int = 0
    need: int = 0


Fingerprint = dict[str, str | int | float | bool | None]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When a view is made.

    `expected` members are waited for at the start, for `form_s` at most; then `min_nodes` are enough. A view never has
    more than `max_nodes`. A member silent for longer than `lease_s` is lost. When an exchange broke and nobody is known
    to be lost, `settle_s` (None: `lease_s`) is how long a loss may take to show before all form a new view.
    """

    __pydantic_config__: ClassVar = STRICT
    run: str
    expected: int
    min_nodes: int
    max_nodes: int
    lease_s: float = 5.0
    form_s: float = 120.0
    settle_s: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_nodes <= self.expected <= self.max_nodes:
            raise PlanError(
                f"got {self.min_nodes} members at least, {self.expected} expected, {self.max_nodes} at most; "
                "these must be from 1 on and may not fall"
            )
        if self.lease_s <= 0 or self.form_s < 0 or self.settling_s < 0:
            raise PlanError(f"got a lease of {self.lease_s} s; lease, forming and settling times must be above 0")

    @property
    def settling_s(self) -> float:
        """`settle_s`, resolved."""
        return self.lease_s if self.settle_s is None else self.settle_s


@dataclass(frozen=True, kw_only=True)
class MemberEvent:
    """Something that a member said. `member` is its id, fresh for each process."""

    __pydantic_config__: ClassVar = STRICT
    member: str


@dataclass(frozen=True, kw_only=True)
class Arrived(MemberEvent):
    """A member's first word on each connection: who it is, the last view it knows (0: none), steps held (-1: none)."""

    run: str
    seat: int | None
    node: str
    store: str
    fingerprint: Fingerprint
    epoch: int
    step: int

    def __post_init__(self) -> None:
        if not self.member or (self.seat is not None and self.seat < 0):
            raise ValueError(f"member {self.member!r} in seat {self.seat}, expected a name and a seat from 0 on")


@dataclass(frozen=True, kw_only=True)
class Beat(MemberEvent):
    """It lives, trains in view `epoch` and holds `step` committed steps."""

    epoch: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Entered(MemberEvent):
    """It switched to view `epoch` and is connected there."""

    epoch: int


@dataclass(frozen=True, kw_only=True)
class Broken(MemberEvent):
    """An exchange failed in view `epoch`; it waits for a new view."""

    epoch: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Leaving(MemberEvent):
    """It wants to hand over and go."""


@dataclass(frozen=True, kw_only=True)
class Finished(MemberEvent):
    """Training came to its end."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Failed(MemberEvent):
    """It failed by its own fault (the user's code, a full disk): the whole run must end."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Disconnected:
    """A member's connection ended; `how` goes into the cause of the next view."""

    member: str
    how: str = "its connection broke"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A launcher saw a member's process end. Names the member, or who holds the seat now."""

    __pydantic_config__: ClassVar = STRICT
    how: str
    member: str | None = None
    seat: int | None = None

    def __post_init__(self) -> None:
        if (self.member is None) == (self.seat is None):
            raise ValueError(f"got member {self.member!r} and seat {self.seat}, expected one of them")


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, kw_only=True)
class StopAsked:
    """A person wants training to end after the step at hand."""


Event = MemberEvent | Disconnected | Ended | Tick | StopAsked

FROM_MEMBERS: dict[str, type[MemberEvent]] = {
    "hello": Arrived,
    "beat": Beat,
    "entered": Entered,
    "broken": Broken,
    "leaving": Leaving,
    "finished": Finished,
    "failed": Failed,
}


@dataclass(frozen=True)
class Send:
    """Send `document` to `member`."""

    member: str
    document: Document


@dataclass(frozen=True)
class Close:
    """End `member`'s connection, after what was sent before."""

    member: str


@dataclass(frozen=True)
class Record:
    """Make `document` durable before any later instruction is followed."""

    document: Document


Instruction = Send | Close | Record


def event_of(document: Document, member: str | None = None) -> MemberEvent:
    """Read what a member sent.

    Args:
        member: who sent it; None for its first document, which must be `hello` and names it.

    Raises:
        CoordinatorError: it is no document of the protocol.
    """
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in FROM_MEMBERS:
        known = f"{', '.join(FROM_MEMBERS)}{nearest(str(kind), FROM_MEMBERS)}"
        raise CoordinatorError(f"got a document of kind {str(kind)[:40]!r}, expected one of {known}")
    if member is None and kind != "hello":
        raise CoordinatorError(f"got '{kind}' as a member's first document, expected 'hello'")
    fields = {name: value for name, value in document.items() if name != "kind"}
    if member is not None and fields.setdefault("member", member) != member:
        raise CoordinatorError(f"got '{kind}' of member {fields['member']!r} on the connection of {member!r}")
    return checked(FROM_MEMBERS[kind], fields, what=f"'{kind}'")
