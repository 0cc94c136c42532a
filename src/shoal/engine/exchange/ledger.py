"""What a rank of a local sync holds from view to view: anchors, outer momentum, and how much it has learned since.

A fragment's *round* begins when the difference from the anchor leaves, and is over when its mean has been merged. Each
fragment's rounds are counted, so that ranks can tell who has merged what. A round that broke may be undone: then it
never happened, its samples count again, and the values keep what they have learned. Connections are no part of this;
neither is any word of other ranks: see `engine/views/rounds.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from shoal.engine.exchange import parameters
from shoal.engine.exchange.parameters import Section
from shoal.engine.layout.replica import Replica
from shoal.strategy.flat import bucket_bytes
from shoal.strategy.sync.local import LocalConfig, Rhythm, num_fragments, outer_step, rhythm


class Held(NamedTuple):
    """What one rank has learned of one fragment that no merged round holds: its samples after step `since`."""

    samples: int
    since: int


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """A round that is not over.

    Attributes:
        own_samples, all_samples: that count in it, this rank's and everybody's.
        step: after which it left.
        since: after which those samples were used.
        plain: the mean is taken as it is, without outer optimizer, and becomes every rank's own value.
    """

    own_samples: int
    all_samples: int
    step: int
    since: int
    plain: bool = False


@dataclass
class Fragment:
    """Parts of the model whose differences leave together; lists have one entry for each section.

    Attributes:
        sections: hold this rank's own values.
        anchors: the values that all ranks agreed on last, shape (n,).
        momenta: the outer optimizer's; None without.
        sent: this rank's values when the difference left.
        merged: rounds that are over.
        own_samples, all_samples: since the difference last left; this rank's and everybody's.
        since: the step after which they are counted.
        leaving: the round that is not over, if there is one.
    """

    sections: Sequence[Section]
    anchors: list[Tensor]
    momenta: list[Tensor | None]
    sent: list[Tensor]
    merged: int = 0
    own_samples: int = 0
    all_samples: int = 0
    since: int = 0
    leaving: Leaving | None = None

    @classmethod
    def of(cls, sections: Sequence[Section], config: LocalConfig, step: int) -> Self:
        """The values are the anchor."""
        momenta = [torch.zeros_like(s.values) if config.outer_momentum else None for s in sections]
        anchors, sent = ([s.values.clone() for s in sections] for _ in range(2))
        return cls(sections, anchors, momenta, sent, since=step)

    @property
    def held(self) -> Held:
        """What is in no merged round, as if the one that is not over had never left."""
        if self.leaving is None:
            return Held(self.own_samples, self.since)
        return Held(self.own_samples + self.leaving.own_samples, self.leaving.since)

    @property
    def tensors(self) -> list[Tensor]:
        """What all ranks hold alike: anchors and momentum."""
        return [*self.anchors, *(momentum for momentum in self.momenta if momentum is not None)]

    def leave(self, step: int, *, plain: bool = False) -> float:
        """A round begins after `step`; return this rank's weight in it, 0 to 1."""
        assert self.leaving is None, "the round before is not over"
        self.leaving = Leaving(
            own_samples=self.own_samples, all_samples=self.all_samples, step=step, since=self.since, plain=plain
        )
        self.own_samples = self.all_samples = 0
        self.since = step
        for sent, section in zip(self.sent, self.sections, strict=True):
            sent.copy_(section.values)
        return self.leaving.own_samples / max(self.leaving.all_samples, 1)

    def merge(self, differences: Sequence[Tensor], config: LocalConfig, *, overlaps: bool) -> None:
        """The round is over: move the anchor by the mean of (anchor - values), and take it over."""
        assert self.leaving is not None, "no round has begun"
        for anchor, difference, momentum in zip(self.anchors, differences, self.momenta, strict=True):
            if self.leaving.plain:
                anchor.sub_(difference)
            else:
                outer_step(anchor, difference, momentum, config)
        self.take_over(config, overlaps=overlaps)

    def take_over(self, config: LocalConfig, *, overlaps: bool) -> None:
        """The anchor has moved: keep what this rank has learned since the difference left."""
        assert self.leaving is not None, "no round has begun"
        for section, anchor, sent in zip(self.sections, self.anchors, self.sent, strict=True):
            if self.leaving.plain or not overlaps:
                section.values.copy_(anchor)
            elif config.merge == "carry":
                section.values.sub_(sent).add_(anchor)
            else:
                section.values.lerp_(anchor, 0.5)
        self.leaving = None
        self.merged += 1

    def undo(self) -> None:
        """The round never happened: its samples count in the next."""
        if self.leaving is not None:
            self.own_samples += self.leaving.own_samples
            self.all_samples += self.leaving.all_samples
            self.since = self.leaving.since
            self.leaving = None

    def begin_at(self, step: int, merged: int) -> None:
        """A newcomer's values are the anchor after `step`, of which it has learned nothing itself."""
        for section, anchor in zip(self.sections, self.anchors, strict=True):
            section.values.copy_(anchor)
        self.merged, self.own_samples, self.all_samples = merged, 0, 0
        self.since, self.leaving = step, None


@dataclass
class Ledger:
    """All fragments of one rank, and the rhythm.

    Attributes:
        every: steps between two rounds of a fragment; 0: not yet measured.
        base: the step from which the rhythm counts; the first that is measured, while it is not.
        known: by seat, what every member held of each fragment when the view began.
    """

    config: LocalConfig
    fragments: list[Fragment]
    every: int
    base: int = 0
    known: Mapping[int, Sequence[Held]] = field(default_factory=dict)

    @classmethod
    def of(cls, replica: Replica, config: LocalConfig, step: int = 0) -> Self:
        """Lay a model out in fragments; its values, after `step`, are the anchors."""
        laid = parameters.lay_out(replica, num_fragments(config), bucket_bytes(config.bucket_mb))
        every = 0 if config.every == "auto" else config.every
        return cls(config, [Fragment.of(sections, config, step) for sections in laid], every)

    @property
    def rhythm(self) -> Rhythm | None:
        """When fragments leave and are merged, by steps from `base` on; None: not yet measured."""
        return rhythm(self.config, self.every, len(self.fragments)) if self.every else None

    @property
    def overlaps(self) -> bool:
        """Whether steps are taken while a fragment is on its way."""
        return self.rhythm is not None and self.rhythm.overlap > 0

    def count(self, own_samples: int, all_samples: int) -> None:
        """A step was taken on so many samples."""
        for fragment in self.fragments:
            fragment.own_samples += own_samples
            fragment.all_samples += all_samples

    def state_dict(self) -> dict[str, Any]:
        """All but the anchors, which the model holds, and other ranks' words; the tensors are this object's own."""
        fragments = self.fragments
        return {
            "base": self.base,
            "every": self.every,
            "samples": [(fragment.own_samples, fragment.all_samples) for fragment in fragments],
            "leaving": [dataclasses.asdict(f.leaving) if f.leaving is not None else None for f in fragments],
            "values": [section.values for fragment in fragments for section in fragment.sections],
            "sent": [sent for fragment in fragments for sent in fragment.sent],
            "momentum": [momentum for fragment in fragments for momentum in fragment.momenta],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s value."""
        self.resume(state)
        own = self.state_dict()
        for values, saved in zip(own["values"] + own["sent"], state["values"] + state["sent"], strict=True):
            values.copy_(saved)
        for fragment, samples, leaving in zip(self.fragments, state["samples"], state["leaving"], strict=True):
            fragment.own_samples, fragment.all_samples = samples
            fragment.leaving = Leaving(**leaving) if leaving else None

    def resume(self, state: Mapping[str, Any]) -> int:
        """Go on from the anchors with the momentum and rhythm of `state_dict`'s value, all ranks alike.

        Returns:
            How many samples, of all ranks, are in no anchor of some fragment: what was learned from them is gone.
        """
        self.every, self.base = state["every"] or self.every, state["base"]
        for momentum, saved in zip(self.state_dict()["momentum"], state["momentum"], strict=True):
            if momentum is not None and saved is not None:
                momentum.copy_(saved)
        under_way = [leaving["all_samples"] if leaving else 0 for leaving in state["leaving"]]
        return max(sum(pair) for pair in zip((count for _, count in state["samples"]), under_way, strict=True))
