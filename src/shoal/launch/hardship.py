"""Faults that last: slow or frozen processes, links cut or slow, a full disk.

Faults may overlap, so none is undone by itself: what each acts on has a state that follows from all faults under way,
and is brought into that state when one begins or ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from shoal.cluster.description import Node
from shoal.cluster.faults import Fault, Kind
from shoal.launch.brake import Brake
from shoal.launch.damage import Ballast
from shoal.launch.lab.lab import Lab
from shoal.units import format_rate


@dataclass(frozen=True, kw_only=True, eq=False)
class Hardship:
    """A fault under way.

    Attributes:
        node: the node it is on; empty for one that strikes none.
        seats: the seats that feel it.
        pids: the processes that it holds back; empty for one that acts on a link or disk.
        since: when it began, on the monotonic clock.
    """

    fault: Fault
    node: str
    seats: tuple[int, ...]
    pids: frozenset[int]
    since: float

    @property
    def until(self) -> float:
        """When it is over; infinity for one that is for good."""
        return math.inf if self.fault.seconds is None else self.since + self.fault.seconds


class Hardships:
    """All faults under way, and what they act on."""

    def __init__(self, lab: Lab | None, folder: Path) -> None:
        """Nothing happens yet. `folder` is where a disk is filled."""
        self.under_way: list[Hardship] = []
        self._lab = lab
        self._brakes: dict[int, Brake] = {}
        self._ballast = Ballast(folder)

    @property
    def idle_seats(self) -> set[int]:
        """Those that can take no part in the training now: frozen or cut off."""
        return {seat for hardship in self.under_way if hardship.fault.rule.idling for seat in hardship.seats}

    def begin(self, hardship: Hardship) -> None:
        """Let it act from now on, until `end`, which must be called also if this raises.

        Raises:
            LabError: the kernel refused.
            FaultsError: the disk is too large to fill.
            OSError: a disk refused.
        """
        self.under_way.append(hardship)
        self._settle(hardship)

    def end(self, hardship: Hardship) -> None:
        """End it; what other faults do to the same process, node or disk goes on.

        Raises:
            LabError: the kernel refused.
        """
        self.under_way.remove(hardship)
        self._settle(hardship)

    def describe(self, hardship: Hardship) -> str:
        """What it does, for a person."""
        fault, node = hardship.fault, hardship.node
        match fault.kind:
            case "freeze":
                return f"processes {_listed(hardship.pids)} are stopped"
            case "slow" if (cpu := self._declared_cpu(node)) is not None:
                return f"{node} has {cpu / (fault.factor or 1):.3g} of a core instead of {cpu:.3g}"
            case "slow":
                return f"processes {_listed(hardship.pids)} run 1/{fault.factor:.3g} of the time"
            case "cut":
                return f"whatever {node} sends or is sent is lost"
            case "slow_link":
                rate = self._declared_rate(node)
                return (
                    f"the link of {node} has {format_rate(rate / (fault.factor or 1))} instead of {format_rate(rate)}"
                )
            case _:
                return "the run directory's disk is full"

    def _settle(self, hardship: Hardship) -> None:
        """Bring what a fault acts on into the state that all faults under way give it."""
        kind, node = hardship.fault.kind, hardship.node
        match kind:
            case "slow" if self._lab is not None and (cpu := self._declared_cpu(node)) is not None:
                self._lab.set_cpu(node, cpu / self._factor("slow", node))
            case "freeze" | "slow":
                for pid in hardship.pids:
                    self._hold(pid)
            case "cut":
                lab = self._links()
                (lab.cut if self._of_kind("cut", node) else lab.restore)(node)
            case "slow_link":
                self._links().set_rate(node, self._declared_rate(node) / self._factor("slow_link", node))
            case _ if self._of_kind(kind, node):
                self._ballast.fill()
            case _:
                self._ballast.remove()

    def _hold(self, pid: int) -> None:
        brake = self._brakes.setdefault(pid, Brake(pid))
        share = self._share(pid)
        brake.set_share(share)
        if share == 1:
            del self._brakes[pid]

    def _share(self, pid: int) -> float:
        """The part of the time that the faults under way leave to a process."""
        share = 1.0
        for hardship in self.under_way:
            if pid in hardship.pids and hardship.fault.kind == "freeze":
                return 0.0
            if pid in hardship.pids and self._declared_cpu(hardship.node) is None:
                share /= hardship.fault.factor or 1
        return share

    def _of_kind(self, kind: Kind, node: str) -> list[Hardship]:
        return [other for other in self.under_way if (other.fault.kind, other.node) == (kind, node)]

    def _factor(self, kind: Kind, node: str) -> float:
        return math.prod(hardship.fault.factor or 1 for hardship in self._of_kind(kind, node))

    def _links(self) -> Lab:
        assert self._lab is not None, "the injector refuses these faults without a lab"
        return self._lab

    def _declared(self, node: str) -> Node | None:
        nodes = self._lab.cluster.nodes if self._lab is not None else ()
        return next((declared for declared in nodes if declared.name == node), None)

    def _declared_cpu(self, node: str) -> float | None:
        declared = self._declared(node)
        return None if declared is None else declared.cpu

    def _declared_rate(self, node: str) -> float:
        declared = self._declared(node)
        assert declared is not None
        assert declared.rate_bits_per_s is not None, "the injector refuses to slow a link without a rate"
        return declared.rate_bits_per_s


def _listed(pids: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(pids)))
