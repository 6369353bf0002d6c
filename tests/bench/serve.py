"""What serving a batch of reads takes in the worker's code alone, part by part: no guest, no wake-up, warm caches.

The best of many turns is what the code needs; how far a VM stays behind it is the price of waking up. The parts
say what a faster path would have to replace.
"""

from __future__ import annotations

import os
import time
from typing import Any

import zmq

from cellvisor.core.abi import virtio
from cellvisor.core.wire.reactor import Reactor
from cellvisor.devices.virtio.blk import Blk
from tests.bench.effort import Effort, Place
from tests.bench.figures import Row
from tests.fakes.host import Rig

PARTS = ("fetch", "execute", "publish")
BLOCK = 4096


def serve(effort: Effort, place: Place) -> dict[str, Any]:
    """Time batches of 4 KiB reads in us per request, the best of each part, and a turn of the loop around them."""
    path = str(place.disk("disk.raw"))
    batches = {str(depth): _batches(path, depth, effort.requests) for depth in effort.depths}
    return {"turn_us": _turn(effort.requests), "preadv_us": _preadv(path, effort.requests), "batches": batches}


def _batches(path: str, depth: int, requests: int) -> dict[str, float]:
    rig = Rig(Blk, {"path": path})
    rig.host.enter_syscall, rig.host.leave_syscall = (  # type: ignore[method-assign]
        rig.state.enter_syscall, rig.state.leave_syscall)
    queue, device, best = rig.host.queues[0], rig.device, dict.fromkeys(PARTS, float("inf"))
    try:
        for turn in range(max(50, requests // depth)):
            for slot in range(depth):
                sector = (turn * 7919 + slot * 8) % 60_000 // 8 * 8
                rig.drivers[0].add([virtio.BLK_REQUEST.pack(virtio.BLK_T_IN, 0, sector)], [BLOCK, 1])
            rig.drivers[0].offer()
            began = time.perf_counter()
            chains = queue.harvest()
            fetched = time.perf_counter()
            for chain in chains:
                queue.begin(chain)
                queue.complete(chain, device._request(chain))
            executed = time.perf_counter()
            queue.publish()
            published = time.perf_counter()
            if len(chains) != depth or len(rig.drivers[0].used()) != depth:
                raise RuntimeError(f"{len(chains)} of {depth} requests were served")
            for part, took in zip(PARTS, (fetched - began, executed - fetched, published - executed), strict=True):
                best[part] = min(best[part], took)
    finally:
        rig.close()
    return {part: round(took * 1e6 / depth, 2) for part, took in best.items()}


def _preadv(path: str, requests: int) -> float:
    best, buffer = float("inf"), memoryview(bytearray(BLOCK))
    fd = os.open(path, os.O_RDONLY)
    try:
        for number in range(requests):
            began = time.perf_counter()
            os.preadv(fd, [buffer], number % 8000 * BLOCK)
            best = min(best, time.perf_counter() - began)
    finally:
        os.close(fd)
    return round(best * 1e6, 2)


def _turn(turns: int) -> float:
    """Time a turn of the worker's loop that finds one kick and no message."""
    reactor, kick, best = Reactor(), os.eventfd(0, os.EFD_NONBLOCK), float("inf")
    with zmq.Context() as context, context.socket(zmq.DEALER) as messages:
        reactor.add_zmq(messages, lambda frames: None)
        reactor.add(kick, lambda events: drain(kick))
        for _ in range(turns):
            os.eventfd_write(kick, 1)
            began = time.perf_counter()
            reactor.turn()
            best = min(best, time.perf_counter() - began)
        reactor.remove_zmq(messages)
    reactor.close()
    os.close(kick)
    return round(best * 1e6, 2)


def drain(fd: int) -> None:
    """Take a kick."""
    os.eventfd_read(fd)


def serve_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    rows = [Row(f"worker's code per request, batches of {depth}", f"{sum(parts.values()):.1f} us", "",
                ", ".join(f"{name} {took:.1f}" for name, took in parts.items()))
            for depth, parts in found["batches"].items()]
    return [*rows, Row("turn of the worker's loop around a batch", f"{found['turn_us']:.1f} us", "",
                       f"preadv of 4 KiB alone {found['preadv_us']:.1f} us")]
