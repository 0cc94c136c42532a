"""A sparse table on servers, as `shoal.SparseTable` sees it."""

from __future__ import annotations

from torch import Tensor

from shoal.servers.client import ServerClient
from shoal.servers.requests import Pending


class RemoteTable:
    """Gives a `SparseTable` its rows: `table.attach(RemoteTable(client, name))`. Counts this worker's steps."""

    def __init__(self, client: ServerClient, name: str, *, clock: int = 0) -> None:
        """The table must be known to the client (`create_table` or `know_table`)."""
        self._client = client
        self._name = name
        self._pushed: Pending[None] | None = None
        self.clock = clock

    def pull(self, ids: Tensor) -> Tensor:
        """Rows of `ids`, shape (n, dim), for this worker's present step."""
        return self._client.pull_rows(self._name, ids, self.clock).result()

    def push(self, ids: Tensor, gradients: Tensor) -> None:
        """Send one step's gradients of distinct rows; waits for the acknowledgement of the step before only."""
        self.wait()
        self._pushed = self._client.push_rows(self._name, ids, gradients, self.clock)
        self.clock += 1

    def wait(self) -> None:
        """Until the last push is acknowledged."""
        if self._pushed is not None:
            self._pushed.result()
            self._pushed = None
