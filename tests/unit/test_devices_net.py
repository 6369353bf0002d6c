"""virtio-net against fake drivers, on taps that are socket pairs."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from cellvisor.core.abi import net, tap
from cellvisor.core.errors import RingError, UsageError
from cellvisor.devices.backends import tapcard
from cellvisor.devices.virtio import net as module
from cellvisor.devices.virtio.net import Net
from tests.fakes.host import Rig
from tests.fakes.net import CTRL, MAC, OTHER, PLAIN, RX, TX, Card, FakeTap, frame


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with ExitStack() as stack:
        yield lambda *features, **options: stack.enter_context(closing(Card(monkeypatch, *features, **options)))


# ---- frames out


@pytest.mark.parametrize("split", [(12,), (5, 12, 30), (40,)])
def test_frames_leave_with_their_header(make: Any, split: tuple[int, ...]) -> None:
    card = make()
    whole = b"\x01\x01" + bytes(10) + frame(3000)
    pieces = [whole[a:b] for a, b in zip((0, *split), (*split, None), strict=True)]
    assert card.request(pieces, [], TX) == b""
    assert card.peers[0].recv(9000) == whole
    assert (card.device.counters()["tx_frames"], card.device.counters()["tx_bytes"]) == (1, 3000)


def test_frames_wait_for_room_and_leave_in_order(make: Any) -> None:
    card = make()
    total = 0
    while not card.device.pairs[0].marked:
        card.drivers[TX].add([bytes(12) + frame(1000, seed=total)], [])
        card.kick(TX)
        card.drivers[TX].used()
        total += 1
        assert total < 10000, "the fake tap never fills"
    card.drivers[TX].add([bytes(12) + frame(1000, seed=total)], [])
    card.kick(TX)
    seen = []
    while len(seen) < total + 1:
        seen.append(card.peers[0].recv(9000)[12:])
        card.host.reactor.turn(0)
    assert seen == [frame(1000, seed=number) for number in range(total + 1)]
    assert len(card.drivers[TX].outstanding) == 2
    card.drivers[TX].used()
    assert not card.drivers[TX].outstanding


def test_what_the_tap_refuses_is_dropped(make: Any) -> None:
    card = make()
    card.peers[0].close()
    assert card.request([bytes(12) + frame()], [], TX) == b""
    assert card.device.counters()["tx_dropped"] == 1
    assert card.request([bytes(80000)], [], TX) == b""
    assert card.device.counters()["tx_dropped"] == 2


def test_a_frame_without_its_header_breaks_the_rules(make: Any) -> None:
    card = make()
    card.drivers[TX].add([b"short"], [])
    with pytest.raises(RingError, match="queue 1: a frame of 5 bytes"):
        card.kick(TX)


def test_a_marked_frame_counts_as_sent_and_the_next_ones_go(make: Any) -> None:
    """What a successor does with the frames that its predecessor had fetched."""
    card = make()
    queue = card.host.queues[TX]
    for number in range(3):
        card.drivers[TX].add([bytes(12) + frame(seed=number)], [])
    card.drivers[TX].offer()
    chains = queue.harvest()
    queue.sending(chains[0])
    queue.close()
    again = card.host.queues[TX] = card.drivers[TX].queue(TX, epoch=1, state=card.state)
    again.requeue(again.recover())
    assert len(card.drivers[TX].used()) == 1
    card.kick(TX)
    assert [card.peers[0].recv(9000)[12:] for _ in range(2)] == [frame(seed=1), frame(seed=2)]
    assert len(card.drivers[TX].used()) == 2


# ---- frames in


@pytest.mark.parametrize("buffers", [[2048] * 4, [70000, 2048], [2048] * 64])
def test_small_frames_take_a_buffer_each(make: Any, buffers: list[int]) -> None:
    card = make()
    card.room(*buffers)
    sent = [frame(60 + number, seed=number) for number in range(2)]
    card.come(*sent)
    assert card.received() == sent
    assert card.device.counters()["rx_frames"] == 2
    assert card.drivers[RX].interrupts() > 0


@pytest.mark.parametrize("buffers", [[500] * 40, [1500] * 60, [13, 20, 9000], [65, 65, 65, 66000]])
@pytest.mark.parametrize("features", [PLAIN, PLAIN | net.F_GUEST_TSO4])
def test_large_frames_are_merged(make: Any, buffers: list[int], features: int) -> None:
    card = make(features)
    card.room(*buffers)
    sent = frame(5000, seed=7)
    card.come(sent)
    assert card.received() == [sent]
    assert not card.device.pairs[0].space - sum(buffers) + sum(
        size for head in card.drivers[RX].last for _, size, _ in card.drivers[RX].last[head])


def test_a_frame_waits_for_room_once(make: Any) -> None:
    card = make()
    card.come(frame(4000, seed=1), frame(60, seed=2))
    card.room(100)
    card.host.reactor.turn(0)
    assert card.received() == []
    card.room(8000)
    card.host.reactor.turn(0)
    assert card.received() == [frame(4000, seed=1)]
    card.room(200)
    assert card.received() == [frame(60, seed=2)]
    assert card.device.counters()["rx_dropped"] == 0


def test_a_frame_for_which_there_is_never_room_is_dropped(make: Any) -> None:
    card = make()
    card.come(frame(4000), frame(60, seed=2))
    card.room(100)
    card.host.reactor.turn(0)
    card.room(100)
    card.host.reactor.turn(0)
    assert card.received() == [frame(60, seed=2)]
    assert card.device.counters()["rx_dropped"] == 1


def test_without_mergeable_buffers_each_is_for_a_whole_frame(make: Any) -> None:
    card = make(net.F_STATUS)
    card.room(200, 200)
    card.come(frame(150, seed=1), frame(4000), frame(100, seed=2))
    assert card.received() == [frame(150, seed=1), frame(100, seed=2)]
    assert card.device.counters()["rx_dropped"] == 1


def test_a_buffer_too_small_for_the_header_breaks_the_rules(make: Any) -> None:
    card = make()
    with pytest.raises(RingError, match="a receive buffer of 11 bytes"):
        card.room(11)


def test_a_reset_throws_away_what_waits(make: Any) -> None:
    card = make()
    card.come(frame(), frame())
    card.device.on_reset()
    assert card.taps[0].flags == 0
    card.room(2048, 2048)
    card.host.reactor.turn(0)
    assert card.received() == []


def test_a_paused_card_does_nothing(make: Any) -> None:
    card = make()
    card.room(2048)
    card.device.on_pause()
    card.come(frame())
    assert card.received() == []
    card.device.on_resume()
    card.host.reactor.turn(0)
    assert card.received() == [frame()]


# ---- what the driver orders


def test_offloads_follow_the_features(make: Any) -> None:
    card = make(net.F_GUEST_CSUM | net.F_GUEST_TSO4 | net.F_HOST_TSO4)
    assert card.taps[0].flags == tap.TUN_F_CSUM | tap.TUN_F_TSO4
    assert not make(None, offload_csum=False).spec.features & (tapcard.CSUM | tapcard.TSO | tapcard.UFO)
    some = make(None, offload_tso=False, offload_ufo=False).spec.features
    assert (some & tapcard.CSUM, some & (tapcard.TSO | tapcard.UFO)) == (tapcard.CSUM, 0)


def test_the_filter_obeys_the_control_queue(make: Any) -> None:
    card = make()
    group, vlan = bytes.fromhex("01005e000001"), b"\x81\x00\x00\x07"

    def passes(**about: Any) -> bool:
        card.room(2048)
        card.come(frame(**about))
        return bool(card.received())

    assert passes(to=OTHER), "a card begins with every frame"
    assert card.order(net.CTRL_RX, net.CTRL_RX_PROMISC, b"\0") == net.OK
    assert not passes(to=OTHER)
    assert passes(to=MAC)
    assert passes(to=b"\xff" * 6)
    assert not passes(to=group)
    table = struct.pack("<I", 1) + OTHER + struct.pack("<I", 1) + group
    assert card.order(net.CTRL_MAC, net.CTRL_MAC_TABLE_SET, table) == net.OK
    assert passes(to=OTHER)
    assert passes(to=group)
    assert not passes(kind=vlan)
    assert card.order(net.CTRL_VLAN, net.CTRL_VLAN_ADD, b"\7\0") == net.OK
    assert passes(kind=vlan)
    assert card.order(net.CTRL_VLAN, net.CTRL_VLAN_DEL, b"\7\0") == net.OK
    assert not passes(kind=vlan)
    assert card.order(net.CTRL_MAC, net.CTRL_MAC_ADDR_SET, bytes(5) + b"\2") == net.OK
    assert card.config()[0] == bytes(5) + b"\2"
    assert not passes(to=MAC)
    assert card.device.counters()["rx_filtered"] == 5


@pytest.mark.parametrize(("kind", "command", "data"), [
    (9, 0, b""), (net.CTRL_RX, 77, b"\1"), (net.CTRL_RX, net.CTRL_RX_PROMISC, b""),
    (net.CTRL_RX, net.CTRL_RX_PROMISC, b"\1\1"), (net.CTRL_MAC, net.CTRL_MAC_ADDR_SET, bytes(5)),
    (net.CTRL_MAC, net.CTRL_MAC_TABLE_SET, b"\xff" * 8), (net.CTRL_MAC, net.CTRL_MAC_TABLE_SET, bytes(4)),
    (net.CTRL_MAC, net.CTRL_MAC_TABLE_SET, bytes(9)), (net.CTRL_VLAN, net.CTRL_VLAN_ADD, b"\0\x10"),
    (net.CTRL_VLAN, 7, b"\0\0"), (net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, b"\0\0"),
    (net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, b"\2\0"), (net.CTRL_ANNOUNCE, net.CTRL_ANNOUNCE_ACK, b""),
])
def test_commands_that_make_no_sense_are_refused(make: Any, kind: int, command: int, data: bytes) -> None:
    card = make()
    assert card.order(kind, command, data) == net.ERR
    assert card.host.saved == (0, b"")


@pytest.mark.parametrize("chain", [([b"\0"], [1]), ([b"\0\0\1"], [])])
def test_half_a_command_breaks_the_rules(make: Any, chain: tuple[list[bytes], list[int]]) -> None:
    card = make()
    card.drivers[CTRL].add(*chain)
    with pytest.raises(RingError, match="a command of"):
        card.kick(CTRL)


def test_several_pairs_are_used_when_the_driver_says_so(make: Any) -> None:
    card = make(PLAIN | net.F_MQ, num_queues=6)
    assert len(card.spec.queues) == 7
    assert card.config()[2] == 3
    assert [queue.used for queue in card.taps] == [True, False, False]
    assert card.order(net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, b"\2\0", control=6) == net.OK
    assert [queue.used for queue in card.taps] == [True, True, False]
    card.room(2048, pair=1)
    card.come(frame(seed=3), pair=1)
    assert card.received(pair=1) == [frame(seed=3)]
    assert card.request([bytes(12) + frame(seed=4)], [], 3) == b""
    assert card.peers[1].recv(999)[12:] == frame(seed=4)
    card.device.on_reset()
    assert [queue.used for queue in card.taps] == [True, False, False]


def test_a_driver_without_multiqueue_has_its_control_queue_third(make: Any) -> None:
    card = make(PLAIN, num_queues=4)
    assert card.order(net.CTRL_RX, net.CTRL_RX_PROMISC, b"\0", control=2) == net.OK
    assert card.order(net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, b"\2\0", control=2) == net.ERR


def test_a_successor_knows_what_the_driver_ordered(make: Any) -> None:
    card = make(PLAIN | net.F_MQ, num_queues=4)
    card.order(net.CTRL_RX, net.CTRL_RX_PROMISC, b"\0", control=4)
    card.order(net.CTRL_VLAN, net.CTRL_VLAN_ADD, b"\x2c\1", control=4)
    card.order(net.CTRL_MAC, net.CTRL_MAC_ADDR_SET, OTHER, control=4)
    card.order(net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, b"\2\0", control=4)
    assert len(card.host.saved[1]) <= card.spec.private_size
    next_one = make(PLAIN | net.F_MQ, num_queues=4)
    next_one.host.saved = card.host.saved
    next_one.device.on_activate(PLAIN | net.F_MQ)
    assert next_one.config()[0] == OTHER
    assert [queue.used for queue in next_one.taps] == [True, True]
    next_one.room(2048, 2048)
    next_one.come(frame(to=MAC), frame(to=OTHER, kind=b"\x81\x00\x01\x2c"))
    assert next_one.received() == [frame(to=OTHER, kind=b"\x81\x00\x01\x2c")]
    next_one.host.activation = 2
    next_one.device.on_activate(PLAIN)
    next_one.come(frame(to=MAC, seed=5))
    assert next_one.received() == [frame(to=MAC, seed=5)], "another driver began anew"


# ---- limits


def test_limits_hold_each_way_up_by_itself(make: Any) -> None:
    card = make(PLAIN, ops_size=3, ops_refill_time=3_600_000)
    card.room(*[2000] * 8)
    card.come(*(frame(seed=number) for number in range(8)))
    assert card.received() == [frame(seed=number) for number in range(4)], "the last is charged before the next"
    for number in range(8):
        card.drivers[TX].add([bytes(12) + frame(seed=number)], [])
    card.kick(TX)
    assert len(card.drivers[TX].used()) == 3
    assert card.device.counters()["throttled"] == 2
    assert card.device.pairs[0].marked is None, "what waits for tokens is not leaving"
    card.device.call("limit", {"ops_size": 0})
    card.until(lambda: card.device.counters()["rx_frames"] == card.device.counters()["tx_frames"] == 8)
    assert card.received() == [frame(seed=number) for number in range(4, 8)]
    assert [card.peers[0].recv(999)[12:] for _ in range(8)] == [frame(seed=number) for number in range(8)]


def test_a_held_up_card_pauses_and_resets(make: Any) -> None:
    card = make(PLAIN, bw_size=100, bw_refill_time=3_600_000)
    card.room(*[2000] * 8)
    card.come(*[frame(200)] * 4)
    assert len(card.received()) == 2
    card.device.on_pause()
    card.device.on_resume()
    card.kick(RX)
    assert card.received() == []
    card.device.on_reset()
    assert card.host.reactor.turn(0) is None
    assert card.host.kicked == set()


# ---- the cable


def test_link_and_announcement(make: Any) -> None:
    card = make()
    card.room(2048)
    assert card.config()[1] == net.S_LINK_UP
    assert card.device.call("link", {"up": False}) == {"link": "down"}
    assert (card.config()[1], card.taps[0].cable) == (0, False)
    card.come(frame())
    assert card.received() == []
    card.request([bytes(12) + frame()], [], TX)
    assert card.device.counters()["tx_dropped"] == 1
    with pytest.raises(UsageError):
        card.device.call("announce", {})
    assert card.device.call("link", {"up": True}) == {"link": "up"}
    assert (card.config()[1], card.taps[0].cable) == (net.S_LINK_UP | net.S_ANNOUNCE, True)
    card.host.reactor.turn(0)
    assert card.received() == [frame()]
    assert card.order(net.CTRL_ANNOUNCE, net.CTRL_ANNOUNCE_ACK) == net.OK
    assert card.config()[1] == net.S_LINK_UP
    card.device.call("announce", {})
    assert card.config()[1] == net.S_LINK_UP | net.S_ANNOUNCE
    with pytest.raises(UsageError, match="no verb 'dance'"):
        card.device.call("dance", {})


def test_address_and_cable_outlive_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_taps", lambda options, host: [FakeTap(peers)])
    peers: list[socket.socket] = []
    with ExitStack() as stack:
        first = stack.enter_context(closing(Rig(Net, {})))
        mac, status, _, mtu = net.CONFIG.unpack(first.spec.config)
        assert (mac[0], status, mtu) == (0x2E, net.S_LINK_UP, 1400)
        first.device.call("link", {"up": False})
        store = {"card": os.dup(first.host.store["card"])}
        second = stack.enter_context(closing(Rig(Net, {}, store=store, generation=2)))
        assert net.CONFIG.unpack(second.spec.config)[:2] == (mac, 0)
    for peer in peers:
        peer.close()


def test_a_deleted_tap_is_a_link_that_is_down(make: Any) -> None:
    card = make()
    card.room(2048)
    card.device._ready(card.device.pairs[0], 0x8)  # EPOLLERR
    assert card.config()[1] == 0
    assert card.host.logged == ["tap fake0 is gone"]


def test_a_queue_that_needs_a_reset_keeps_nobody_busy(make: Any) -> None:
    card = make()
    card.room(2048)
    card.host.queues.pop(RX).close()
    card.come(frame())
    assert card.device.pairs[0].watched == 0


def test_a_drained_card_drops_and_refuses(make: Any) -> None:
    card = make()
    for index, chain in ((RX, ([], [100])), (TX, ([b"x"], [])), (CTRL, ([b"\0\0\1"], [1]))):
        card.drivers[index].add(*chain)
        card.drivers[index].offer()
    (room,), (out,), (order,) = (card.host.queues[index].harvest() for index in (RX, TX, CTRL))
    assert Net.drain(RX, room) is None
    assert Net.drain(TX, out) == 0
    assert Net.drain(CTRL, order) == 1
    assert bytes(order.writable[0]) == bytes([net.ERR])
