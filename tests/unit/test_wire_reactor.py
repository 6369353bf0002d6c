"""The epoll loop: removal within a turn, reused numbers, timers, ZeroMQ's edges, stop from anywhere."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from cellvisor.core.wire.reactor import ZMQ_BATCH, Reactor


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    loop = Reactor()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]]:
    context = zmq.Context()
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    left.bind("inproc://pair")
    right.connect("inproc://pair")
    yield left, right
    context.destroy(linger=0)


def full_eventfd() -> int:
    return os.eventfd(1, os.EFD_NONBLOCK)


def test_callback_runs_while_ready(reactor: Reactor) -> None:
    fd = full_eventfd()
    calls: list[int] = []
    reactor.add(fd, calls.append)
    reactor.turn(0)
    reactor.turn(0)
    assert calls == [select.EPOLLIN] * 2
    reactor.modify(fd, 0)
    reactor.turn(0)
    reactor.remove(fd)
    reactor.remove(fd)
    reactor.turn(0)
    assert len(calls) == 2
    os.close(fd)


def test_removed_by_another_callback_of_the_same_turn(reactor: Reactor) -> None:
    fds = [full_eventfd(), full_eventfd()]
    calls: list[int] = []

    def first_to_run(mine: int) -> None:
        calls.append(mine)
        for fd in fds:
            reactor.remove(fd)

    for fd in fds:
        reactor.add(fd, lambda events, fd=fd: first_to_run(fd))  # type: ignore[misc]
    reactor.turn(0)
    assert len(calls) == 1
    for fd in fds:
        os.close(fd)


def test_stale_event_does_not_reach_a_new_descriptor_of_that_number(reactor: Reactor) -> None:
    fds = [full_eventfd(), full_eventfd()]
    wrong: list[int] = []
    swapped: list[int] = []

    def swap(mine: int) -> None:
        other = fds[1 - fds.index(mine)]
        if swapped:
            return
        swapped.append(other)
        reactor.remove(other)
        os.close(other)
        assert os.eventfd(0, os.EFD_NONBLOCK) == other
        reactor.add(other, wrong.append)

    for fd in fds:
        reactor.add(fd, lambda events, fd=fd: swap(fd))  # type: ignore[misc]
    reactor.turn(0)
    assert len(swapped) == 1
    assert wrong == []
    for fd in fds:
        os.close(fd)


def test_closed_before_removed_does_not_spin(reactor: Reactor) -> None:
    """The open file lives on in a duplicate (as in another process), so epoll still reports it."""
    fd, witness = full_eventfd(), full_eventfd()
    duplicate = os.dup(fd)
    calls: list[int] = []
    reactor.add(fd, lambda events: None)
    reactor.add(witness, calls.append)
    os.close(fd)
    reactor.remove(fd)
    reactor.turn(0)
    before = len(calls)
    reactor.modify(witness, 0)
    started = time.monotonic()
    reactor.turn(0.05)
    assert time.monotonic() - started >= 0.04, "the stale registration still wakes the loop"
    reactor.modify(witness, select.EPOLLIN)
    reactor.turn(0)
    assert len(calls) == before + 1
    for number in (duplicate, witness):
        os.close(number)


def test_regular_file_and_second_add_are_refused(reactor: Reactor) -> None:
    with open(__file__) as plain, pytest.raises(PermissionError):
        reactor.add(plain.fileno(), lambda events: None)
    fd = full_eventfd()
    calls: list[int] = []
    reactor.add(fd, calls.append)
    with pytest.raises(FileExistsError):
        reactor.add(fd, lambda events: None)
    reactor.turn(0)
    assert calls
    os.close(fd)


def test_timers_run_in_order_once(reactor: Reactor) -> None:
    fired: list[str] = []
    reactor.after(0.02, lambda: fired.append("late"))
    reactor.after(0, lambda: fired.append("soon"))
    dropped = reactor.after(0.01, lambda: fired.append("dropped"))
    reactor.cancel(dropped)
    deadline = time.monotonic() + 10
    while "late" not in fired and time.monotonic() < deadline:
        reactor.turn(1)
    assert fired == ["soon", "late"]


def test_timer_may_cancel_another_that_is_due(reactor: Reactor) -> None:
    fired: list[int] = []
    keys: list[int] = []
    for index in range(2):
        keys.append(reactor.after(0, lambda index=index: (fired.append(index), reactor.cancel(keys[1]))))  # type: ignore[misc]
    reactor.turn(0)
    assert fired == [0]


def test_cancel_keeps_nothing(reactor: Reactor) -> None:
    """A cancelled or fired timer must leave nothing behind, however often that happens."""
    for _ in range(10_000):
        reactor.cancel(reactor.after(3600, lambda: None))
    key = reactor.after(0, lambda: None)
    reactor.turn(0)
    for _ in range(10):
        reactor.cancel(key)
    assert len(reactor._timers) < 200
    assert reactor._due == {}


def test_cancelled_id_is_never_another_timers(reactor: Reactor) -> None:
    fired: list[int] = []
    first = reactor.after(0, lambda: None)
    reactor.turn(0)
    reactor.cancel(first)
    reactor.after(0, lambda: fired.append(1))
    reactor.turn(0)
    assert fired == [1]


def test_stop_from_a_signal_handler_ends_the_wait(reactor: Reactor) -> None:
    """Python restarts epoll_wait after a handler, so stop() must make a descriptor ready."""
    before = signal.signal(signal.SIGUSR2, lambda number, frame: reactor.stop())
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2))
    try:
        timer.start()
        reactor.run()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, before)
    assert not reactor.running


def test_stop_from_another_thread(reactor: Reactor) -> None:
    timer = threading.Timer(0.05, reactor.stop)
    timer.start()
    reactor.run()
    timer.join()


def test_message_already_there_when_added(reactor: Reactor,
                                          pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    left, right = pair
    right.send(b"early")
    got: list[list[bytes]] = []
    reactor.add_zmq(left, got.append)
    reactor.turn(1)
    assert got == [[b"early"]]


def test_edge_swallowed_by_a_send_is_not_lost(reactor: Reactor,
                                              pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    """A send reads the socket's mailbox, so the descriptor is quiet although a message waits."""
    left, right = pair
    got: list[list[bytes]] = []
    reactor.add_zmq(left, got.append)
    reactor.turn(0)
    kick = full_eventfd()

    def on_kick(events: int) -> None:
        os.eventfd_read(kick)
        for _ in range(50):
            right.send(b"in")
            left.send(b"out")

    reactor.add(kick, on_kick)
    deadline = time.monotonic() + 10
    while len(got) < 50 and time.monotonic() < deadline:
        reactor.turn(1)
    assert len(got) == 50
    os.close(kick)


def test_flood_leaves_turns_to_others(reactor: Reactor,
                                      pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    left, right = pair
    got: list[list[bytes]] = []
    other: list[int] = []
    reactor.add_zmq(left, got.append)
    fd = full_eventfd()
    reactor.add(fd, other.append)
    for _ in range(ZMQ_BATCH * 5):
        right.send(b"x")
    reactor.turn(0)
    assert other
    assert ZMQ_BATCH <= len(got) <= 2 * ZMQ_BATCH
    while len(got) < ZMQ_BATCH * 5:
        reactor.turn(1)
    os.close(fd)


def test_socket_closed_in_its_callback(reactor: Reactor,
                                       pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    left, right = pair
    got: list[list[bytes]] = []

    def end(frames: list[bytes]) -> None:
        got.append(frames)
        left.close(0)

    reactor.add_zmq(left, end)
    right.send(b"1")
    right.send(b"2")
    reactor.turn(1)
    reactor.turn(0)
    reactor.remove_zmq(left)
    reactor.turn(0)
    assert got == [[b"1"]]


def test_removed_socket_gets_nothing_more(reactor: Reactor,
                                          pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes]]) -> None:
    left, right = pair
    got: list[list[bytes]] = []

    def once(frames: list[bytes]) -> None:
        got.append(frames)
        reactor.remove_zmq(left)

    reactor.add_zmq(left, once)
    right.send(b"1")
    right.send(b"2")
    reactor.turn(1)
    reactor.turn(0)
    assert got == [[b"1"]]


def test_hang_up_is_told(reactor: Reactor) -> None:
    left, right = socket.socketpair()
    calls: list[int] = []
    reactor.add(left.fileno(), calls.append)
    right.close()
    reactor.turn(1)
    assert calls[0] & select.EPOLLHUP
    reactor.remove(left.fileno())
    left.close()
