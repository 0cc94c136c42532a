"""Steps on a worker's parts of batches, pushed in its name: the servers take what they lack of them, and no more."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.engine.exchange.alone import Alone
from shoal.engine.layout.replica import Replica
from shoal.job.sparse_table import SparseTable
from shoal.servers import RemoteTable, ServerClient


class InName(Alone):
    """One worker of `num_ranks`, or another one in its place. Nobody is waited for but the servers."""

    def __init__(
        self,
        replica: Replica,
        client: ServerClient,
        tables: dict[str, SparseTable],
        rank: int,
        num_ranks: int,
        *,
        sums: bool,
        fetches: bool,
    ) -> None:
        """Begin.

        Args:
            client: comes in the worker's name.
            rank: the worker's.
            sums: the servers sum all workers' updates of a step (bsp); else each is one of its own.
            fetches: pull each step's values first; else take them as this replica holds them.
        """
        super().__init__(replica, rank, num_ranks)
        self._client = client
        self._sums = sums
        self._fetches = fetches
        self._clock = 0
        self._parameters = dict(replica.named_locals)
        self._tables = tables
        self._remote = {name: RemoteTable(client, name) for name in tables}
        for name, table in tables.items():
            client.know_table(name, table.spec)
            table.attach(self._remote[name])

    def denominator(self, batch: Batch) -> float:
        """As the worker's own."""
        return batch.size if self._sums else super().denominator(batch)

    def begin(self, batch: Batch, clock: int) -> None:
        """Take the values of this step."""
        super().begin(batch, clock)
        self._clock = clock
        for remote in self._remote.values():
            remote.clock = clock
        if self._fetches:
            values = self._client.pull(list(self._parameters), clock).result()
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(values[name])

    def install(self) -> None:
        """Push, and wait until it is acknowledged."""
        super().install()
        gradients: dict[str, Tensor] = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().cpu().contiguous()
            for name, p in self._parameters.items()
        }
        self._replica.clear_gradients()
        self._client.push(gradients, self._clock).result()
        for name, table in self._tables.items():
            table.step()
            self._remote[name].wait()
