"""What is done to gradients before the optimizer takes them.

Clipping by the global norm, where the gradient's memory may be shared by several ranks: each rank takes the norm of its
own portion of every bucket and scales that portion only, so nothing is computed twice on a node, and nobody writes what
another reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.engine.layout.replica import Replica
from shoal.errors import JobError
from shoal.ops import NODE, AllReduce, Barrier, Exchange
from shoal.strategy.bucket import Bucket


def clip(buckets: Sequence[Bucket], max_norm: float, square: Bucket, *, shared: bool) -> Exchange:
    """Scale the reduced gradients so that their 2-norm is at most `max_norm`; as in `torch.nn.utils.clip_grad_norm_`.

    Args:
        square: one float64 value of memory, for the sum over the node.
        shared: the buckets' targets are shared by the ranks of a node.

    Returns:
        The norm before clipping.
    """
    norms = [torch.linalg.vector_norm(bucket.target[bucket.portion], dtype=torch.float64) for bucket in buckets]
    square.source.copy_(torch.stack(norms).square().sum().reshape(1))
    if shared:
        yield AllReduce(square.source, square.target, NODE)
    norm = square.target.sqrt().item()
    factor = max_norm / (norm + 1e-6)
    if factor < 1:
        for bucket in buckets:
            bucket.target[bucket.portion].mul_(factor)
    if shared:
        yield Barrier(NODE)
    return norm


def scale(buckets: Sequence[Bucket], factor: float, *, shared: bool) -> Exchange:
    """Multiply the reduced gradients by `factor`, once all ranks that share their memory have looked at them."""
    if shared:
        yield Barrier(NODE)
    for bucket in buckets:
        bucket.target[bucket.portion].mul_(factor)
    if shared:
        yield Barrier(NODE)


def require_gradients(replica: Replica) -> None:
    """Check that there is something to learn from.

    Raises:
        JobError: no parameter has a gradient.
    """
    if replica.is_whole and all(held.local.grad is None for held in replica.held):
        raise no_gradient()


def no_gradient() -> JobError:
    """The error for a loss that does not depend on the model."""
    return JobError(
        "no parameter got a gradient on any rank; expected a loss that depends on the model's parameters: is it "
        "computed under torch.no_grad, or from detached tensors?"
    )
