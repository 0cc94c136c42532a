"""What a server knows of one key: its values, how fresh they are, who waits for them, and who else holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from shoal.strategy.sync.staleness import Answer, Apply, Duplicate, Hold, Instruction, Refuse, Staleness, UpdateId
from shoal.wire.frame import IN_NAME, Header


class RefusalError(Exception):
    """A request that cannot be carried out; the message is for the worker."""


class Shard(Protocol):
    """The values behind a key: `dense.DensePiece` or `table.TableShard`. An update is what its own `check` accepts."""

    version: int
    """How many times it was updated."""

    @property
    def size_bytes(self) -> int:
        """Of the values, without optimizer state."""

    def check(self, update: Any) -> str | None:
        """Why `update` does not fit, or None."""

    def apply(self, updates: list[Any]) -> None:
        """Sum `updates` in this order and take one step. Does not write to them."""

    def dump(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A copy of everything a resume needs."""

    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take a `dump` over."""


@dataclass(slots=True)
class Holding:
    """One key on this server.

    Attributes:
        primary: whether workers talk to this server about it; else it only follows its primary.
        replica: the server that each update is forwarded to before it is acknowledged, or None.
        moved: another server has taken over; this one answers nothing about it any more.
    """

    key: str
    shard: Shard
    staleness: Staleness
    primary: bool
    replica: int | None
    moved: bool = False
    _held: dict[UpdateId, Any] = field(default_factory=dict)

    def check(self, update: Any) -> None:
        """Raises RefusalError if `update` does not fit."""
        reason = self.shard.check(update)
        if reason:
            raise RefusalError(f"{self.key}: {reason}")

    def take(self, header: Header, update: Any, answer: Callable[[Any], None]) -> bool:
        """Do with one update what the staleness says; `answer` gets the tokens of pulls that may be answered now.

        Returns:
            Whether it is new, and has not come before.

        Raises:
            RefusalError: it contradicts an earlier one.
        """
        instructions = self.staleness.update_came(
            header.rank, header.sequence, header.clock, header.oldest, in_name=bool(header.flags & IN_NAME)
        )
        self._obey(instructions, update, answer)
        return not isinstance(instructions[0], Duplicate)

    def change_members(self, workers: Sequence[int], clock: int) -> None:
        """From `clock` on, others are waited for."""
        self.staleness.members_changed(workers, clock)
        self._held.clear()

    def leave(self, worker: int, answer: Callable[[Any], None]) -> None:
        """Wait for this worker no more."""
        self._obey(self.staleness.worker_left(worker), None, answer)

    def ask(self, clock: int, token: Any, answer: Callable[[Any], None]) -> None:
        """Answer a pull, now or when the values are fresh enough."""
        self._obey(self.staleness.pull_came(clock, token), None, answer)

    def _obey(self, instructions: list[Instruction], update: Any, answer: Callable[[Any], None]) -> None:
        for instruction in instructions:
            match instruction:
                case Apply(updates):
                    self.shard.apply([self._held.pop(known, update) for known in updates])
                case Hold(known):
                    self._held[known] = update
                case Answer(token):
                    answer(token)
                case Refuse(_, reason):
                    raise RefusalError(f"{self.key}: {reason}")
                case Duplicate():
                    pass
