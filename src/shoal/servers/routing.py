"""Which server to ask for what: the pieces of dense parameters, the shards of sparse tables. No sockets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from shoal.errors import ServerRefusedError
from shoal.job.sparse_rows import TableSpec
from shoal.strategy.sync.sharding import Piece, replica_of_rows, server_of_rows


class Routing:
    """Names -> servers."""

    def __init__(self, pieces: Sequence[Piece], num_servers: int, *, replicate: bool) -> None:
        self._num_servers = num_servers
        self._replicate = replicate
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            self._pieces[piece.parameter].append(piece)
        self.num_rows = {name: group[-1].stop for name, group in self._pieces.items()}  # along dim 0
        self.tables: dict[str, TableSpec] = {}

    def pieces_of(self, names: Iterable[str]) -> Iterator[Piece]:
        """All pieces of these parameters, in order.

        Raises:
            ServerRefusedError: a name has no pieces.
        """
        for name in names:
            if name not in self._pieces:
                raise ServerRefusedError(f"'{name}' lies on no server: it was not among the shapes given to `assign`")
            yield from self._pieces[name]

    def cut(self, piece: Piece, tensor: Tensor) -> Tensor:
        """The piece's part of a parameter-shaped tensor, contiguous; a view where it can be."""
        return (tensor if piece.key == piece.parameter else tensor[piece.start : piece.stop]).contiguous()

    def grouped(self, names: Iterable[str], size_bytes: int, num_keys: int) -> list[list[Piece]]:
        """Pieces gathered into messages to the same servers, in order, up to about `size_bytes` each."""
        done: list[list[Piece]] = []
        filling: dict[tuple[int, ...], list[Piece]] = {}
        for piece in self.pieces_of(names):
            holders = self.holders(piece)
            group = filling.get(holders)
            if (
                group is None
                or len(group) == num_keys
                or sum(p.size_bytes for p in group) + piece.size_bytes > size_bytes
            ):
                group = filling[holders] = []
                done.append(group)
            group.append(piece)
        return done

    def holders(self, piece: Piece) -> tuple[int, ...]:
        """The primary, then the replica if there is one."""
        return (piece.primary,) if piece.replica is None else (piece.primary, piece.replica)

    def table_shard(self, table: str, server: int) -> tuple[str, tuple[int, ...]]:
        """The key under which the rows that hash to `server` are held, and by whom."""
        replica = replica_of_rows(server, self._num_servers, replicate=self._replicate)
        return f"{table}/{server}", (server,) if replica is None else (server, replica)

    def split_rows(self, table: str, ids: Tensor) -> list[Tensor | None]:
        """For each server the places in `ids` of its rows; None for all of them.

        Raises:
            ServerRefusedError: there is no such table, or an id is not of it.
        """
        if table not in self.tables:
            raise ServerRefusedError(f"there is no sparse table '{table}': call create_table or know_table first")
        reason = self.tables[table].wrong_ids(ids)
        if reason:
            raise ServerRefusedError(f"sparse table '{table}': {reason}")
        if self._num_servers == 1:
            return [None]
        servers = torch.from_numpy(server_of_rows(ids.numpy(), self._num_servers))
        return [(servers == server).nonzero().squeeze(1) for server in range(self._num_servers)]

    def all_keys(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every key there is and its holders."""
        dense = [(piece.key, self.holders(piece)) for group in self._pieces.values() for piece in group]
        tables = [self.table_shard(name, server) for name in self.tables for server in range(self._num_servers)]
        return dense + tables
