"""A sharded model waits for a frozen rank no longer than the view lasts, though it has got a part of a message."""

from __future__ import annotations

from rank_pairs import run_pair

RANK = """
import contextlib, json, os, signal, socket, struct, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from shoal.engine.layout.place import take_place_in_view
from shoal.engine.layout.sharding import shard
from shoal.errors import PeerLostError
from shoal.strategy.layout.config import LayoutConfig
from shoal.strategy.layout.grid import arrange
from shoal.wire.groups import World, lost_peers_named

rank, port = int(sys.argv[1]), int(sys.argv[2])
base = dist.TCPStore("127.0.0.1", port, None, rank == 0, wait_for_workers=False, timeout=timedelta(seconds=60))
world = World(dist.PrefixStore("view", base), rank, 2, torch.device("cpu"), exempt_ports=[port])
world.connect()
config = LayoutConfig(replicate=1, shard=2)
place = take_place_in_view(config, arrange(config, ["a", "b"]), world, torch.device("cpu"))
model = nn.Linear(20_000, 5_000, bias=False)
shard(model, [], place, bf16=False)
gather = place.gathering.gather_into

def received_bytes():
    total = 0
    for descriptor in list(world._sockets):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received
    return total

def gather_and_freeze(gathered, own):
    # The operation has two messages under way until its second half. Then there is one, to be left alone with.
    enough = received_bytes() + own.nbytes * 3 // 4
    def freeze():
        while received_bytes() < enough:
            time.sleep(0.0005)
        os.kill(int(base.get("peer")), signal.SIGSTOP)
    threading.Thread(target=freeze, daemon=True).start()
    gather(gathered, own)

if rank == 1:
    base.set("peer", str(os.getpid()))
else:
    place.gathering.gather_into = gather_and_freeze
world.everybody.barrier()
started = time.perf_counter()
threading.Timer(2.0, world.cut).start()
try:
    with lost_peers_named():
        model(torch.ones(1, 20_000))
except PeerLostError as error:
    told = str(error)
freed_s = time.perf_counter() - started
world.close()
print(json.dumps([freed_s, time.perf_counter() - started, told]), flush=True)
os._exit(0)
"""


def test_a_cut_frees_a_sharded_model_in_the_middle_of_a_message() -> None:
    freed_s, closed_s, told = run_pair(RANK)
    assert 2.0 <= freed_s < 10.0, told
    assert closed_s < 10.0
