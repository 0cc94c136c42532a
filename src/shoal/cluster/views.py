"""Views: who trains together, as one ordered sequence. Each is a plain document that travels as JSON.

A member has a **seat**, a number that it keeps as long as it lives; its **rank** in a view is its place among the
view's seats, so ranks are 0 to n-1 in every view and seats may have gaps. Who is in the next view is decided by
`membership`; here is only what a view says.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import pydantic

from shoal.errors import CoordinatorError
from shoal.strict_toml import STRICT

Document = dict[str, Any]
"""What travels and what is logged: plain values that JSON can carry."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ViewMember:
    """One member: its seat, the name of its node, and where its store listens (`host:port`)."""

    __pydantic_config__: ClassVar = STRICT
    seat: int
    node: str
    store: str


@dataclass(frozen=True, kw_only=True)
class View:
    """Who trains together from `epoch` on.

    `members` are sorted by seat. `planned`: members of the view before go on training until all are ready to switch
    at a step boundary; otherwise the view before is broken and its step under way did not happen. `cause` is a
    sentence for a person.
    """

    __pydantic_config__: ClassVar = STRICT
    run: str
    epoch: int
    members: tuple[ViewMember, ...]
    planned: bool
    cause: str

    def __post_init__(self) -> None:
        seats = self.seats
        if not seats or list(seats) != sorted(set(seats)) or seats[0] < 0 or self.epoch < 1:
            raise ValueError(f"epoch {self.epoch}, seats {list(seats)}; expected an epoch from 1, rising seats from 0")

    @property
    def seats(self) -> tuple[int, ...]:
        """The seats, rising: `seats[r]` is rank r's."""
        return tuple(member.seat for member in self.members)

    def rank_of(self, seat: int) -> int | None:
        """The rank of `seat` in this view, or None if it is not a member."""
        return self.seats.index(seat) if seat in self.seats else None

    def to_plain(self) -> Document:
        """The view as a document."""
        return dataclasses.asdict(self) | {"members": [dataclasses.asdict(member) for member in self.members]}

    @classmethod
    def from_plain(cls, document: object) -> View:
        """Read what `to_plain` made.

        Raises:
            CoordinatorError: it is no view.
        """
        return checked(cls, document, what="a view")


def checked(cls: type[T], document: object, *, what: str) -> T:
    """Make a `cls` (a dataclass) from a document, strictly: no unknown key, no loose type.

    Raises:
        CoordinatorError: the document does not fit; the message calls it `what` and names the first mistake.
    """
    try:
        # By way of JSON: there, strict checking takes an array for a tuple and an object for a dataclass.
        return typing.cast(T, _adapter(typing.cast(Hashable, cls)).validate_json(json.dumps(document)))
    except pydantic.ValidationError as mistakes:
        mistake = mistakes.errors()[0]
        where = ".".join(map(str, mistake["loc"])) or "the whole"
        raise CoordinatorError(
            f"got a document that is not {what}: {where}: {mistake['msg']} (got {str(mistake['input'])[:100]})"
        ) from None
    except (TypeError, ValueError) as error:
        raise CoordinatorError(f"got a document that is not {what}: {error}") from None


@functools.cache
def _adapter(cls: Hashable) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(typing.cast(Any, cls))
