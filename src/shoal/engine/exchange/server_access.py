"""How a rank reaches the parameter servers: where they are, which pieces lie on which, in whose name it comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoal.engine.exchange.base import Among
from shoal.engine.layout.replica import Replica
from shoal.servers import ClientConfig, ServerClient
from shoal.strategy.sync.parameter_server import ParameterServerConfig, replicated
from shoal.strategy.sync.sharding import assign
from shoal.wire.secrets import load_secrets

_CONNECT_S = 30.0
_RECONNECT_S = 5.0  # servers that were there before a view began


def server_client(
    replica: Replica,
    config: ParameterServerConfig,
    among: Among,
    *,
    worker: int,
    log: Callable[..., None],
    is_over: Callable[[], bool] = lambda: False,
    in_name: bool = False,
) -> ServerClient:
    """A client of all servers, as worker number `worker`; see `servers.ClientConfig` for the rest."""
    settings = ClientConfig(
        addresses=among.servers,
        rank=worker,
        secrets=load_secrets(Path(config.secrets)) if config.secrets else None,
        replicate=replicated(config),
        epoch=among.epoch,
        in_name=in_name,
        lost=among.lost_servers,
        is_over=is_over,
        connect_timeout_s=_RECONNECT_S if among.epoch > 1 else _CONNECT_S,
    )
    shapes = {name: tuple(p.shape) for name, p in replica.named_locals}
    sizes = {name: p.element_size() for name, p in replica.named_locals}
    return ServerClient(settings, assign(shapes, sizes, config.servers, replicate=settings.replicate), log=log)
