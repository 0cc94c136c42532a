"""The noun `Plan`: how a job is trained, as plain data. Every table is one frozen dataclass, all that its
component sees.

The tables of layouts, syncs and codecs stand beside their algorithms, in `strategy/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shoal.strategy.codec import CodecConfig
from shoal.strategy.codec.none import NoneConfig
from shoal.strategy.layout.config import LayoutConfig
from shoal.strategy.sync import SyncConfig
from shoal.strategy.sync.allreduce import AllReduceConfig
from shoal.strict_toml import STRICT

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """`[batch]`: how many samples a step takes, and how they are divided.

    Attributes:
        size: samples of a global batch, over all ranks.
        accumulate: micro-batches into which each rank cuts its share; their gradients are summed.
        shares: a weight for each rank (under a layout: for each shard of each replica); default: equal. The gradient
            stays the exact mean over samples.
        balance: let shares follow each rank's measured speed, and memory where a rank runs out of it; they begin with
            `shares`.
    """

    __pydantic_config__: ClassVar = STRICT
    size: Positive = 64
    accumulate: Positive = 1
    shares: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    balance: bool = False


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """`[compute]`: what happens inside a rank.

    Attributes:
        device: "auto" takes one GPU a rank where the node has enough of them, else the CPU.
        precision: "bf16" runs forward and backward under autocast; parameters stay as the model made them.
        clip_norm: the gradient's global 2-norm is scaled down to this; None leaves it.
        threads: torch threads a rank; 0 divides the node's cores among its ranks.
    """

    __pydantic_config__: ClassVar = STRICT
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    threads: Count = 0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`[data]`: how samples reach a rank.

    Attributes:
        shuffle: a new order each epoch, or the dataset's own.
        drop_last: leave out an epoch's last batch when it is not full.
        workers: loader processes a rank; 0 loads in the training process.
    """

    __pydantic_config__: ClassVar = STRICT
    shuffle: bool = True
    drop_last: bool = False
    workers: Count = 0


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """`[validation]`: when the validation data are looked at.

    Attributes:
        every: steps between validations, and one at the end; 0 never.
        samples: at most so many of the validation samples, the first; 0 takes all.
    """

    __pydantic_config__: ClassVar = STRICT
    every: Count = 100
    samples: Count = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`[checkpoint]`: when state is saved.

    Attributes:
        every: steps between checkpoints, and one at the end; 0 saves only at the end. "auto" follows what a checkpoint
            costs and how often nodes fail.
        keep: how many of the latest stay.
        best: keep also the one with the lowest validation loss.
        memory_every: steps between copies of every shard in another node's memory, where ranks that come and go hold
            one replica together; 0: none, and a loss goes back to the disk.
    """

    __pydantic_config__: ClassVar = STRICT
    every: Count | Literal["auto"] = 200
    keep: Positive = 2
    best: bool = True
    memory_every: Count = 10


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """`[elastic]`: nodes come and go.

    Attributes:
        min_nodes: with fewer workers training waits; 0: no worker may be lost, the first failure ends the run.
        max_nodes: more workers than this wait for a place; default: as many as come.
        lease_s: a worker silent for so long is lost. One that dies is noticed at once.
        restarts: how often the launcher starts a worker again in the place of one that died.
        leave_out_slower_than: a worker that is lastingly slower than the usual one by this factor leaves; 0: none does.
        notice_s: after SIGTERM a worker hands over and leaves, within so long in any case.
        stuck_after_s: a worker that loads samples, is in one forward, or does not come out of a broken view for so
            long ends itself; 0: never.
        tls_certificate: the coordinator's certificate chain (PEM), on the machine where `shoal train` runs; default:
            members talk to it without TLS.
        tls_key: its private key (PEM, without a passphrase).
        tls_authority: the certificate (PEM) that vouches for `tls_certificate`; default: that itself.
    """

    __pydantic_config__: ClassVar = STRICT
    notice_s: Annotated[float, Field(gt=0, le=3600)] = 25.0
    min_nodes: Count = 0
    max_nodes: Positive | None = None
    lease_s: Annotated[float, Field(gt=0, le=3600)] = 3.0
    restarts: Count = 0
    leave_out_slower_than: Annotated[float, Field(ge=0)] = 0.0
    stuck_after_s: Annotated[float, Field(ge=0)] = 600.0
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_authority: str | None = None


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """`[stop]`: when training ends: at whichever limit is met first; without any, after one epoch.

    Attributes:
        steps, epochs, seconds: limits of the whole run, resumed parts included (seconds count training time only).
        until: a validation value to reach, e.g. "val_loss<=1.9" or "accuracy>=0.98".
        patience: stop after so many validations in a row without a new lowest validation loss; 0 never.
    """

    __pydantic_config__: ClassVar = STRICT
    steps: Count | None = None
    epochs: Count | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None
    until: str | None = None
    patience: Count = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a job is trained.

    Attributes:
        seed: of the order of samples, of the initial model and of each rank's random generators.
    """

    __pydantic_config__: ClassVar = STRICT
    seed: Count = 0
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    sync: SyncConfig = field(default_factory=AllReduceConfig)
    codec: CodecConfig = field(default_factory=NoneConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    stop: StopConfig = field(default_factory=StopConfig)
