"""A device in the test's own process: the worker's Host without messages, over fake drivers."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Mapping
from typing import Any

from cellvisor.core.ring.queue import Queue
from cellvisor.core.ring.state import StateMap, create_state
from cellvisor.core.wire.options import build
from cellvisor.core.wire.reactor import Reactor
from tests.fakes.driver import FakeDriver, FakeGuest


class FakeHost:
    """Host of one device. `store` is what deposit() kept, `configs` what set_config() published."""

    def __init__(self, store: Mapping[str, int] | None = None, generation: int = 1) -> None:
        self.device_id, self.generation, self.activation, self.trial = "dev0", generation, 1, False
        self.reactor = Reactor()
        self.store = dict(store or {})
        self.configs: list[bytes] = []
        self.logged: list[str] = []
        self.saved = (0, b"")
        self.queues: dict[int, Queue] = {}
        self.kicked: set[int] = set()

    def watch(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        self.reactor.add(fd, callback, events)

    def unwatch(self, fd: int) -> None:
        self.reactor.remove(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> int:
        return self.reactor.after(seconds, callback)

    def cancel(self, timer: int) -> None:
        self.reactor.cancel(timer)

    def deposit(self, name: str, fd: int) -> None:
        self.store[name] = os.dup(fd)

    def take(self, name: str) -> int | None:
        return os.dup(self.store[name]) if name in self.store else None

    def set_config(self, data: bytes) -> None:
        self.configs.append(data)

    def queue(self, index: int) -> Queue | None:
        return self.queues.get(index)

    def kick(self, index: int) -> None:
        self.kicked.add(index)

    def enter_syscall(self) -> None:
        pass

    def leave_syscall(self) -> None:
        pass

    def save(self, data: bytes, version: int = 1) -> None:
        self.saved = version, data

    def load(self) -> tuple[int, bytes]:
        return self.saved

    def backend(self, change: str, text: str) -> None:
        self.logged.append(f"backend {change}: {text}")

    def log(self, text: str) -> None:
        self.logged.append(text)


class Rig:
    """A device of class `cls` with `options`, its host, and one fake driver per queue, active."""

    def __init__(self, cls: type[Any], options: dict[str, Any], *, store: Mapping[str, int] | None = None,
                 features: int | None = None, generation: int = 1, guest: FakeGuest | None = None) -> None:
        self.host = FakeHost(store, generation)
        self.device = cls(build(cls.Options, options), self.host)
        self.spec = self.device.spec
        self.own_guest = guest is None
        self.guest = guest or FakeGuest(8 << 20)
        self.state_fd = create_state(self.spec.queues, self.spec.private_size)
        self.state = StateMap(self.state_fd)
        self.drivers = [FakeDriver(size, guest=self.guest) for size in self.spec.queues]
        self.device.on_activate(self.spec.features if features is None else features)
        for index, driver in enumerate(self.drivers):
            self.host.queues[index] = driver.queue(index, epoch=1, state=self.state)

    def kick(self, index: int = 0) -> None:
        """Offer what the driver added and have the device serve it."""
        self.drivers[index].offer()
        queue = self.host.queues[index]
        self.device.on_queue(index, queue)
        queue.publish()

    def request(self, readable: list[bytes], writable: list[int], index: int = 0) -> bytes:
        """Send one chain and return its whole writable part once it is used."""
        head = self.drivers[index].add(readable, writable)
        self.kick(index)
        ((used, self.length),) = self.drivers[index].used()
        assert used == head
        return self.drivers[index].data(head)

    def until(self, done: Callable[[], Any], seconds: float = 10) -> None:
        """Turn the loop, serving kicks of the device to itself, until `done()`."""
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "nothing happened"
            self.host.reactor.turn(0.02)
            for index in sorted(self.host.kicked):
                self.host.kicked.discard(index)
                self.device.on_queue(index, self.host.queues[index])
                self.host.queues[index].publish()

    def close(self) -> None:
        """Close everything."""
        self.device.close()
        for queue in self.host.queues.values():
            queue.close()
        for driver in self.drivers:
            driver.close()
        self.state.close()
        os.close(self.state_fd)
        for fd in self.host.store.values():
            os.close(fd)
        self.host.reactor.close()
        if self.own_guest:
            self.guest.close()
