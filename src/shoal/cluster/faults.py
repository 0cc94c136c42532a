"""Failures to rehearse: what goes wrong, to whom, at which step; written in `faults.toml`.

Each `[[fault]]` table is one fault; a `[random]` table draws many more, the same ones for the same seed. Here they are
read, checked and put in order of step, as plain values; the launcher's injector does them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from shoal import strict_toml
from shoal.cluster.description import Count, HostName
from shoal.errors import FaultsError

Kind = Literal[
    "kill",
    "freeze",
    "slow",
    "cut",
    "slow_link",
    "fill_disk",
    "flip_checkpoint",
    "flip_message",
    "join",
    "preempt",
    "kill_coordinator",
]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one kind of fault takes, needs and does.

    Attributes:
        addressed: it strikes one rank or node, which must be named; others concern the run as a whole.
        lasting: it may end by itself after `seconds`.
        scaled: it needs a `factor`.
        idling: whom it strikes takes no part in the training while it lasts.
        removing: whom it strikes never comes back.
        needs_lab: it works on a link, which only the lab has.
    """

    addressed: bool = True
    lasting: bool = False
    scaled: bool = False
    idling: bool = False
    removing: bool = False
    needs_lab: bool = False


RULES: Mapping[Kind, Rule] = MappingProxyType(
    {
        "kill": Rule(removing=True),
        "freeze": Rule(lasting=True, idling=True),
        "slow": Rule(lasting=True, scaled=True),
        "cut": Rule(lasting=True, idling=True, needs_lab=True),
        "slow_link": Rule(lasting=True, scaled=True, needs_lab=True),
        "fill_disk": Rule(addressed=False, lasting=True),
        "flip_checkpoint": Rule(addressed=False),
        "flip_message": Rule(),
        "join": Rule(addressed=False),
        "preempt": Rule(removing=True),
        "kill_coordinator": Rule(addressed=False),
    }
)

Duration = Annotated[float, pydantic.Field(gt=0)]
Factor = Annotated[float, pydantic.Field(gt=1)]


def _rising(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError(f"got {list(span)}, expected the least first, then the most")
    return span


@dataclass(frozen=True, kw_only=True)
class _Table:
    """One `[[fault]]` table."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = strict_toml.STRICT

    kind: Kind
    step: Count
    rank: Annotated[int, pydantic.Field(ge=0)] | None = None
    node: HostName | None = None
    seconds: Duration | None = None
    factor: Factor | None = None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        kind: what happens; a key of RULES.
        step: when whom it strikes has committed this step, from 1; where it strikes nobody, when any rank has.
        rank: the seat (initial rank) it strikes.
        node: or the node, with all its ranks.
        seconds: how long it lasts; None is for good.
        factor: by how much a rank or link is slower.
        spare: None for a fault that a file names. For a drawn one, how many ranks it must leave at work; it strikes
            another rank where its own is gone.
        seed: for what is left to chance in it, such as the byte to flip.
        where: the file and line that ask for it, for messages; empty for a drawn one.

    Raises:
        FaultsError: a value is out of range, or its kind does not take it.
    """

    kind: Kind
    step: int
    rank: int | None = None
    node: str | None = None
    seconds: float | None = None
    factor: float | None = None
    spare: int | None = None
    seed: int = 0
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        given = {key: value for key in _KEYS if (value := getattr(self, key)) is not None}
        table = strict_toml.build(_Table, given, text="", origin=self.where or "fault", error=FaultsError)
        if mistake := _mistake(table):
            raise FaultsError(f"{self.where or 'fault'}: {mistake[0]}: {mistake[1]}")

    @property
    def rule(self) -> Rule:
        """What holds for its kind."""
        return RULES[self.kind]

    @property
    def origin(self) -> str:
        """Who asks for it, for messages."""
        return self.where or ("fault" if self.spare is None else "[random]")

    def __str__(self) -> str:
        """`kill of rank 2 at step 40`."""
        target = f"rank {self.rank}" if self.rank is not None else self.node
        return f"{self.kind}{f' of {target}' if target else ''} at step {self.step}"


_KEYS = ("kind", "step", "rank", "node", "seconds", "factor")


@dataclass(frozen=True, kw_only=True)
class RandomFaults:
    """The `[random]` table: a soak.

    Attributes:
        count: how many faults.
        kinds: which may be drawn; naming one twice makes it twice as likely.
        every_steps: the least and most steps from one to the next, drawn uniformly.
        spare: never fewer than so many ranks train at once, neither frozen nor cut off.
        seconds: how short and how long one that lasts may be.
        factor: how little and how much slower one makes a rank or link.
    """

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = strict_toml.STRICT

    count: Count
    kinds: Annotated[tuple[Kind, ...], pydantic.Field(min_length=1)]
    every_steps: Annotated[tuple[Count, Count], pydantic.AfterValidator(_rising)] = (3, 20)
    spare: Count = 1
    seconds: Annotated[tuple[Duration, Duration], pydantic.AfterValidator(_rising)] = (0.5, 3.0)
    factor: Annotated[tuple[Factor, Factor], pydantic.AfterValidator(_rising)] = (2.0, 8.0)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """All of `faults.toml`; `schedule` makes a list of it."""

    seed: int = 0
    named: tuple[Fault, ...] = ()
    random: RandomFaults | None = None


@dataclass(frozen=True, kw_only=True)
class _File:
    """The whole file."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = strict_toml.STRICT

    seed: Annotated[int, pydantic.Field(ge=0)] = 0
    fault: list[_Table] = field(default_factory=list)
    random: RandomFaults | None = None


def require_without_lab(fault: Fault) -> None:
    """Refuse what only the lab can do.

    Raises:
        FaultsError: it works on a link.
    """
    if fault.rule.needs_lab:
        raise FaultsError(
            f"{fault.origin}: {fault.kind} works on a node's own link, which only the lab has: add --on lab "
            "(--lab nodes=4,link=100mbit)"
        )


def load_faults(path: Path) -> Faults:
    """Read `faults.toml`.

    Raises:
        FaultsError: the file cannot be read, is not TOML, or says something that cannot be done; the message names
            the line.
    """
    text = strict_toml.read(path, error=FaultsError)
    values = strict_toml.parse(text, origin=str(path), error=FaultsError)
    file = strict_toml.build(_File, values, text=text, origin=str(path), error=FaultsError)
    if not file.fault and file.random is None:
        raise FaultsError(f"{path}: it has no [[fault]] and no [random] table, so nothing would happen")
    for index, table in enumerate(file.fault):
        if mistake := _mistake(table):
            line = strict_toml.line_of(text, ["fault", str(index), mistake[0]])
            raise FaultsError(f"{path}:{line}: fault.{index}.{mistake[0]}: {mistake[1]}")
    if idle := _idle_key(values.get("random", {}), file.random):
        line = strict_toml.line_of(text, ["random", idle])
        raise FaultsError(f"{path}:{line}: random.{idle}: none of the kinds takes {idle}")
    named = tuple(
        Fault(**vars(table), seed=_seed(file.seed, index), where=f"{path}:{_line_of_target(text, index, table)}")
        for index, table in enumerate(file.fault)
    )
    return Faults(seed=file.seed, named=named, random=file.random)


def _mistake(table: _Table) -> tuple[str, str] | None:
    """The key that the fault's kind does not take, or lacks, and what to say of it."""
    kind, rule = table.kind, RULES[table.kind]
    for key in ("rank", "node"):
        if not rule.addressed and getattr(table, key) is not None:
            return key, f"{kind} strikes the run as a whole; leave {key} out"
    if rule.addressed and table.rank is None and table.node is None:
        return "kind", f"{kind} strikes somebody; name a rank (rank = 2) or a node (node = 'node2')"
    if table.rank is not None and table.node is not None:
        return "node", "rank and node are both given; name one of them"
    if table.seconds is not None and not rule.lasting:
        return "seconds", f"{kind} does not last; only {_kinds_that('lasting')} take seconds"
    if table.factor is not None and not rule.scaled:
        return "factor", f"{kind} has no degree; only {_kinds_that('scaled')} take a factor"
    if table.factor is None and rule.scaled:
        return "kind", f"{kind} needs a factor, such as factor = 4.0"
    return None


def _kinds_that(attribute: str) -> str:
    *most, last = [kind for kind, rule in RULES.items() if getattr(rule, attribute)]
    return f"{', '.join(most)} and {last}"


def _idle_key(given: Mapping[str, Any], soak: RandomFaults | None) -> str | None:
    """A key of `[random]` that no kind drawn would use."""
    rules = [RULES[kind] for kind in soak.kinds] if soak else []
    used = {"seconds": any(rule.lasting for rule in rules), "factor": any(rule.scaled for rule in rules)}
    return next((key for key, is_used in used.items() if key in given and not is_used), None)


def _line_of_target(text: str, index: int, table: _Table) -> int:
    key = next((key for key in ("rank", "node") if getattr(table, key) is not None), "kind")
    return strict_toml.line_of(text, ["fault", str(index), key])


def _seed(seed: int, index: int) -> int:
    return random.Random(f"{seed}/{index}").getrandbits(32)


def schedule(faults: Faults, num_ranks: int) -> list[Fault]:
    """Return every fault, drawn ones included, in order of step. Equal arguments give equal lists.

    Args:
        num_ranks: how many ranks the run begins with.

    Raises:
        FaultsError: a rank is none of the run's, or so many faults cannot be drawn without striking the spare ranks.
    """
    for fault in faults.named:
        # One that joins takes the next number.
        joined = sum(other.kind == "join" and other.step < fault.step for other in faults.named)
        if fault.rank is not None and fault.rank >= num_ranks + joined:
            raise FaultsError(
                f"{fault.where or 'fault'}: rank: got {fault.rank}, expected 0 to {num_ranks + joined - 1}: "
                f"the run has {num_ranks} ranks{f' and {joined} that joined by then' if joined else ''}"
            )
    drawn = _draw(faults.random, faults.seed, num_ranks) if faults.random else ()
    return sorted([*faults.named, *drawn], key=lambda fault: fault.step)


def _draw(soak: RandomFaults, seed: int, num_ranks: int) -> Iterator[Fault]:
    dice = random.Random(f"{seed}/random")
    alive, num_seats, step = list(range(num_ranks)), num_ranks, 0
    for index in range(soak.count):
        step += dice.randint(*soak.every_steps)
        kinds = [kind for kind in soak.kinds if _can_be_drawn(kind, len(alive), soak.spare, num_ranks)]
        if not kinds:
            raise FaultsError(
                f"[random] can draw only {index} of {soak.count} faults: then {len(alive)} ranks are left, of which "
                f"spare = {soak.spare}; add 'join' to the kinds, or ask for fewer faults"
            )
        kind = dice.choice(kinds)
        rule = RULES[kind]
        rank = dice.choice(alive) if rule.addressed else None
        if rank is not None and rule.removing:
            alive.remove(rank)
        if kind == "join":
            alive.append(num_seats)
            num_seats += 1
        yield Fault(
            kind=kind,
            step=step,
            rank=rank,
            seconds=dice.uniform(*soak.seconds) if rule.lasting else None,
            factor=dice.uniform(*soak.factor) if rule.scaled else None,
            spare=soak.spare,
            seed=dice.getrandbits(32),
        )


def _can_be_drawn(kind: Kind, num_alive: int, spare: int, num_ranks: int) -> bool:
    rule = RULES[kind]
    if rule.removing or rule.idling:
        return num_alive > spare
    return kind != "join" or num_alive < num_ranks  # a soak never grows beyond what the run began with
