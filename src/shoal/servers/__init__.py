"""Parameter servers: processes that hold the model's values and take updates, and the client that workers use.

A model's pieces (`strategy.sync.sharding`) lie on servers, each with its own optimizer; how stale a worker may read is
decided by one state machine a key (`strategy.sync.staleness`); bytes travel by `wire.bulk`.
"""

from shoal.servers.client import ServerClient
from shoal.servers.connections import ClientConfig
from shoal.servers.remote_table import RemoteTable
from shoal.servers.requests import Pending
from shoal.servers.server import Server, ServerConfig

__all__ = ["ClientConfig", "Pending", "RemoteTable", "Server", "ServerClient", "ServerConfig"]
