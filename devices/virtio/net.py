"""virtio-net (virtio 1.2, 5.1) on a tap: frames go straight between the tap and the guest's buffers.

The tap's queues live in core's store. A frame to send is marked before it leaves and counts as sent after a crash;
a received one that spans buffers is published under one commit: a crash may lose one frame per queue, never double
one. What the driver said on the control queue is in the private area, for as long as its activation lasts.
"""

from __future__ import annotations

import select
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cellvisor.core.abi import net
from cellvisor.core.abi.tap import MAX_NAME
from cellvisor.core.abi.virtio import ID_NET
from cellvisor.core.errors import RingError, UsageError
from cellvisor.devices.backends.limiter import LimitedOptions, Waits, limiter_of
from cellvisor.devices.backends.netfilter import HEAD, MAX_STATE, Orders
from cellvisor.devices.backends.tap import MAX_VIEWS, Tap
from cellvisor.devices.backends.tapcard import LARGE, Card, filled, offered, offloads, open_taps
from cellvisor.devices.device import Chain, DeviceBase, Host, Queue, Spec, option

ETHERNET = 18       # bytes of a frame's header with one VLAN tag
MAX_FRAME = net.HEADER.size + ETHERNET + 65535  # the biggest that a tap gives: one to be segmented
BATCH = 128         # frames of one queue in one turn
MAX_COMMAND = 2 + 2 * (4 + 6 * 2048)  # bytes of a control command: both address tables
ONE_BUFFER = struct.pack("<H", 1)


@dataclass(slots=True, eq=False)
class Pair:
    """One receive and one send queue, and the tap's queue behind them."""

    index: int
    tap: Tap
    room: deque[Chain] = field(default_factory=deque)      # for frames to come
    space: int = 0                                         # bytes in them
    sending: deque[Chain] = field(default_factory=deque)   # frames to go
    marked: Chain | None = None                            # the one that is leaving
    held: bytes | None = None                              # a frame that found too little room
    watched: int = 0                                       # epoll events
    owed: int = -1                                         # size of the last frame, which its limits do not know yet


class Net(DeviceBase):
    """One network card."""

    verb: ClassVar[str] = "net"
    help: ClassVar[str] = "network card on a tap, or on passt without privileges"
    COUNTERS: ClassVar[tuple[str, ...]] = ("rx_bytes", "rx_frames", "tx_bytes", "tx_frames", "rx_dropped",
                                           "tx_dropped", "rx_filtered", "throttled")

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(LimitedOptions):
        tap: str | None = option(None, length=MAX_NAME, help="host interface, made if it is not there; default: passt, "
                                 "or a new vmtapN if there is ip or host_mac")
        ip: str | None = option(None, help="the host's address on it, with mask")
        mask: str | None = option(None, help="its network mask")
        mac: str | None = option(None, help="the guest's MAC address, default: a random one")
        host_mac: str | None = option(None, help="the host's MAC address")
        mtu: int | None = option(None, help="largest packet, default: the tap's", min=1280, max=65535)
        fd: list[int] | None = option(None, help="open descriptors of a tap, one for each pair of queues", min=3)
        forward: list[str] | None = option(None, help="on passt, the host's ports: tcp:2222:22, udp:ADDRESS:53:53")
        num_queues: int = option(2, help="queues, two for each pair", min=2, max=62)
        queue_size: int = option(256, help="buffers of a queue", min=16, max=32768, power_of_two=True)
        offload_csum: bool = option(True, help="leave checksums to the other side")
        offload_tso: bool = option(True, help="pass large TCP segments")
        offload_ufo: bool = option(True, help="pass large UDP datagrams")

    def __init__(self, options: Any, host: Host) -> None:
        options = filled(options)
        super().__init__(options, host)
        self._limits = limiter_of(options, host), limiter_of(options, host)  # in, out
        self._waits = Waits(host)
        self._card = Card(options, host)
        self._down = self._card.is_down
        self.pairs = [Pair(index, queue) for index, queue in enumerate(open_taps(options, host))]
        self._mtu = options.mtu or self.pairs[0].tap.mtu
        self._scratch = memoryview(bytearray(MAX_FRAME))
        self._counts = dict.fromkeys(self.COUNTERS, 0)
        self._paused = False
        self._orders = Orders(self._card.mac)
        self._shown = self._config()
        self._mergeable = False
        self._largest = MAX_FRAME
        self._control, self._announces = -1, False
        if host.generation == 1:  # a queue that is left out loses what waits in it
            self._use_queues()

    @property
    def spec(self) -> Spec:
        options = self.options
        features = offered(options, [pair.tap for pair in self.pairs])
        return Spec(virtio_id=ID_NET, pci_class=0x020000, features=features, config=self._config(),
                    queues=(options.queue_size,) * options.num_queues + (64,), private_size=MAX_STATE,
                    title=f"virtio-net on {self.pairs[0].tap.name}, {self._card.mac.hex(':')}",
                    counters=self.COUNTERS)

    def _config(self) -> bytes:
        status = (0 if self._down else net.S_LINK_UP) | (net.S_ANNOUNCE if self._orders.announce else 0)
        return net.CONFIG.pack(self._orders.filter.mac, status, len(self.pairs), self._mtu)

    # ---- the driver comes and goes

    def on_activate(self, features: int) -> None:
        self._mergeable = bool(features & net.F_MRG_RXBUF)
        self._largest = MAX_FRAME if features & LARGE else net.HEADER.size + ETHERNET + max(self._mtu, 1500)
        pairs = len(self.pairs) if features & net.F_MQ else 1
        self._control = 2 * pairs if features & net.F_CTRL_VQ else -1
        self._announces = bool(features & net.F_GUEST_ANNOUNCE)
        saved = Orders.restore(self.host.load()[1], self.host.activation, pairs)
        self._orders = saved or Orders(self._card.mac, most=pairs, vlans=bool(features & net.F_CTRL_VLAN))
        self._show()
        self._waits.clear()
        flags = offloads(features)
        for pair in self.pairs:
            try:
                pair.tap.offload(flags)
            except OSError as error:  # it would give what the driver does not take
                raise UsageError(f"tap {pair.tap.name} refuses offloads {flags:#x}: {error.strerror}") from None
        self._use_queues()

    def _keep(self) -> None:
        """Save what was ordered and show what follows from it."""
        self.host.save(self._orders.pack(self.host.activation))
        self._show()

    def _show(self) -> None:
        if self._shown != (config := self._config()):
            self._shown = config
            self.host.set_config(config)

    def _use_queues(self) -> None:
        """Have frames come on the queues that the driver uses, and no other."""
        for pair in self.pairs[1:]:
            pair.tap.use(pair.index < self._orders.pairs)

    def on_reset(self) -> None:
        self._paused, self._control, self._announces = False, -1, False
        self._orders = Orders(self._card.mac)
        self._waits.clear()
        for pair in self.pairs:
            pair.room.clear()
            pair.sending.clear()
            pair.space, pair.marked, pair.held = 0, None, None
            self._watch(pair)
            pair.tap.empty(self._scratch)  # the next driver may not take what this one did
        self._use_queues()
        self._show()

    def on_pause(self) -> None:
        self._paused = True
        self._waits.clear()  # every queue is kicked after the pause
        self._watch_all()

    def on_resume(self) -> None:
        self._paused = False
        self._watch_all()

    def _watch_all(self) -> None:
        for pair in self.pairs:
            self._watch(pair)

    # ---- from the guest

    def on_queue(self, index: int, queue: Queue) -> None:
        if index == self._control:
            for chain in queue.harvest():
                self._command(queue, chain)
            return
        if index >= 2 * len(self.pairs):
            return
        pair = self.pairs[index // 2]
        if index % 2:
            pair.sending += queue.harvest(BATCH)
            if queue.more:
                self.host.kick(index)
            self._send(pair, queue)
        else:
            chains = queue.harvest()
            for chain in chains:
                if chain.writable_size < net.HEADER.size:
                    raise RingError(f"queue {index}: a receive buffer of {chain.writable_size} bytes")
                pair.space += chain.writable_size
            pair.room += chains
            self._receive(pair, queue, fresh=bool(chains))
        self._watch(pair)

    def _send(self, pair: Pair, queue: Queue) -> None:
        limits = self._limits[1]
        while pair.sending:
            chain = pair.sending[0]
            if chain is not pair.marked:
                if not limits.idle and (wait := limits.take(max(0, chain.readable_size - net.HEADER.size))):
                    self._waits.begin(2 * pair.index + 1, wait)
                    return
                # Before anything else touches it: whatever kills us from here on, it is known what becomes of it.
                (queue.begin if pair.tap.repeats else queue.sending)(chain)
                pair.marked = chain
            if not self._transmit(pair, chain):
                return
            queue.complete(pair.sending.popleft())
            pair.marked = None

    def _transmit(self, pair: Pair, chain: Chain) -> bool:
        """Write one frame, or drop what the tap does not take; False if there is no room for it now."""
        size = chain.readable_size - net.HEADER.size
        if size < 0:
            raise RingError(f"queue {2 * pair.index + 1}: a frame of {chain.readable_size} bytes with its header")
        try:
            if chain.readable_size <= MAX_FRAME and not self._down:
                if not pair.tap.write(chain.readable):
                    return False
                self._counts["tx_bytes"] += size
                self._counts["tx_frames"] += 1
                return True
        except OSError:
            pass  # what makes no sense, or an interface that is down
        self._counts["tx_dropped"] += 1
        return True

    # ---- to the guest

    def _receive(self, pair: Pair, queue: Queue, *, fresh: bool = False) -> None:
        if self._down:
            return
        limits = self._limits[0]
        if pair.held is not None and fresh and pair.room:
            frame, pair.held = pair.held, None
            self._copy(pair, queue, frame, last=True)
        for _ in range(BATCH):
            if pair.held is not None or not pair.room:
                return
            if pair.owed >= 0 and not limits.idle:  # how large a frame is shows when it is there
                if wait := limits.take(pair.owed):
                    self._waits.begin(2 * pair.index, wait)
                    return
                pair.owed = -1
            first = pair.room[0]
            if (self._mergeable and pair.space < self._largest) or len(first.writable) >= MAX_VIEWS:
                size = pair.tap.read([self._scratch])
                if size and self._takes([self._scratch]):
                    self._copy(pair, queue, bytes(self._scratch[:size]))
            else:  # what does not go into the first buffer is copied into the next ones
                size = pair.tap.read([*first.writable, self._scratch])
                if size and self._takes(first.writable):
                    self._deliver(pair, queue, size, self._scratch[:max(0, size - first.writable_size)])
            if not size:
                return
            pair.tap.taken()

    def _takes(self, views: list[memoryview]) -> bool:
        if self._orders.filter.is_open:
            return True
        head = b""
        for view in views:
            head += view[:net.HEADER.size + HEAD - len(head)]
        if self._orders.filter.passes(head[net.HEADER.size:]):
            return True
        self._counts["rx_filtered"] += 1
        return False

    def _copy(self, pair: Pair, queue: Queue, frame: bytes, *, last: bool = False) -> None:
        """Deliver a frame that came when there was little room; keep it once if there is too little for it."""
        if len(frame) > (pair.space if self._mergeable else pair.room[0].writable_size):
            if last or not self._mergeable:
                self._counts["rx_dropped"] += 1
            else:
                pair.held = frame
            return
        done = pair.room[0].write(frame)
        self._deliver(pair, queue, len(frame), memoryview(frame)[done:])

    def _deliver(self, pair: Pair, queue: Queue, size: int, rest: memoryview) -> None:
        """Hand over a frame of `size` bytes: `rest` of it goes behind what the first buffer has."""
        if rest and (not self._mergeable or size > pair.space):
            self._counts["rx_dropped"] += 1  # its buffers stay
            return
        pair.owed = size - net.HEADER.size
        self._counts["rx_bytes"] += pair.owed
        self._counts["rx_frames"] += 1
        first = pair.room.popleft()
        pair.space -= first.writable_size
        if not rest:
            first.write(ONE_BUFFER, net.NUM_BUFFERS)
            queue.complete(first, size)
            return
        used = [(first, first.writable_size)]
        while rest:
            chain = pair.room.popleft()
            pair.space -= chain.writable_size
            used.append((chain, chain.write(rest)))
            rest = rest[used[-1][1]:]
        first.write(struct.pack("<H", len(used)), net.NUM_BUFFERS)
        queue.publish()  # what came before it
        queue.publish_together(used)

    # ---- the tap

    def _watch(self, pair: Pair) -> None:
        events = 0
        if not self._paused:
            ready = pair.room and pair.held is None and 2 * pair.index not in self._waits and not self._down
            events = ((select.EPOLLIN if ready else 0)
                      | (select.EPOLLOUT if pair.marked is not None else 0))
        if events != pair.watched:
            self.host.unwatch(pair.tap.fd)
            pair.watched = events
            if events:
                self.host.watch(pair.tap.fd, lambda seen: self._ready(pair, seen), events)

    def _ready(self, pair: Pair, events: int) -> None:
        index = 2 * pair.index
        receive, send = self.host.queue(index), self.host.queue(index + 1)
        if receive is None:  # its driver broke a rule, and has to reset us
            pair.room.clear()
        elif events & select.EPOLLIN:
            self._receive(pair, receive)
            receive.publish()
        if send is None:
            pair.marked = None
        elif events & (select.EPOLLOUT | select.EPOLLERR):
            self._send(pair, send)
            send.publish()
        if events & (select.EPOLLERR | select.EPOLLHUP) and not self._down:  # it was deleted
            self._down = True
            pair.tap.lost(self.host, self._found)
            self._show()
            self._watch_all()
        self._watch(pair)

    def _found(self) -> None:
        """What was lost is there again."""
        self._down = self._card.is_down
        for pair in self.pairs:
            pair.watched = 0  # another one has its number
        self._show()
        self._watch_all()

    # ---- the control queue

    def _command(self, queue: Queue, chain: Chain) -> None:
        """Do one command: all of them may be done again by a successor."""
        if chain.readable_size < 2 or not chain.writable_size:
            raise RingError(f"a command of {chain.readable_size} bytes, {chain.writable_size} writable")
        command = chain.read(MAX_COMMAND)
        done = chain.readable_size <= MAX_COMMAND and self._orders.obey(command[0], command[1], command[2:])
        if done:
            self._keep()
            self._use_queues()
        chain.write(bytes([net.OK if done else net.ERR]))
        queue.complete(chain, 1)

    # ---- verbs

    def call(self, verb: str, args: dict[str, Any]) -> Any:
        """link {up}: plug the cable in or out; announce {}: have the guest tell its neighbours where it is;
        limit {bw_size, ...}: other rate limits, at once; without keys those of its group have changed."""
        if verb == "limit":
            for limits in self._limits:
                limits.change(args)
            self._waits.kick()  # they were for the old ones
            return {}
        if verb == "link" and type(args.get("up")) is bool:
            self._down = not args["up"]
            self._orders.announce = args["up"] and self._announces
            self._card.plug(args["up"])
            for pair in self.pairs:
                pair.tap.carrier(args["up"])
        elif verb == "announce" and self._announces and not self._down:
            self._orders.announce = True
        else:
            return super().call(verb, args)
        self._keep()
        self._watch_all()
        return {"link": "down" if self._down else "up"}

    @staticmethod
    def drain(index: int, chain: Chain) -> int | None:
        """Drop frames to send, refuse commands (the only ones with both parts); an input buffer stays."""
        if chain.readable and chain.writable:
            return chain.write(bytes([net.ERR]))
        return 0 if chain.readable else None

    def counters(self) -> dict[str, int]:
        return {**self._counts, "throttled": self._waits.count}

    def close(self) -> None:
        for pair in self.pairs:
            self.host.unwatch(pair.tap.fd)
            pair.tap.close()
        self._card.close()
        for limits in self._limits:
            limits.close()

