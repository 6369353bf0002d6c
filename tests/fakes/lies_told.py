"""What a worker may say to core that it should not, and what it may keep to itself."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import Any

import zmq

from cellvisor.core.wire import fdpass, places, zmtp
from cellvisor.core.wire.messages import ToCore, ToWorker, pack
from cellvisor.core.wire.spec import Spec
from tests.fakes.liar import MIB, SPEC, Liar, sleep, tell, wait


def garbage(liar: Liar) -> None:
    """Bytes that are no msgpack."""
    liar.sock.send(b"\xc1\xff\x00garbage")
    sleep()


def never_speaks(liar: Liar) -> None:
    """Nothing at all."""
    sleep()


def unknown_kind(liar: Liar) -> None:
    """A kind that is no string, a huge one, control characters."""
    liar.say(["a" * 200000, "\x1b[2J\n"])  # type: ignore[arg-type]
    sleep()


def terminal_codes(liar: Liar) -> None:
    """A reason that would clear the screen and forge lines of the log."""
    liar.serve()
    liar.say(ToCore.FAILED, reason="\x1b[2J\nroot logged in" + "x" * 9999, refused=False)
    time.sleep(1)  # until it is sent
    os._exit(1)


def ready_first(liar: Liar) -> None:
    """READY before HELLO."""
    liar.say(ToCore.READY)
    sleep()


def second_hello(liar: Liar) -> None:
    """A HELLO with another shape, while it serves."""
    liar.serve()
    wait()
    liar.hello(Spec(virtio_id=2, queues=(8, 8)))
    sleep()


def flood(liar: Liar) -> None:
    """100,000 messages that make core work."""
    liar.serve()
    wait()
    kinds = [pack({"k": kind, **body}) for kind, body in (
        (ToCore.CONFIG, {"data": bytes(8)}), (ToCore.NEEDS_RESET, {"reason": "x" * 3000}),
        (ToCore.COUNTERS, {"values": {str(i): i for i in range(64)}}), (ToCore.POISON, {"queue": 0, "text": "x"}),
        (ToCore.BACKEND, {"change": "lost", "text": "x"}),
        (ToCore.REPLY, {"id": 1, "ok": None}), (ToCore.PAUSED, {}), (ToCore.RESET_DONE, {"epoch": 1}))]
    liar.sock.setsockopt(zmq.SNDHWM, 1000)
    tell("flooding")
    for number in range(100_000):
        liar.sock.send(kinds[number % len(kinds)])
    tell("done")
    sleep()


def raw_flood(liar: Liar) -> None:
    """Empty messages as fast as a socket takes them."""
    liar.serve()
    wait()
    sock = liar.raw()
    tell("flooding")
    while True:
        sock.sendall(bytes(65536))


def endless_message(liar: Liar) -> None:
    """A message of several parts that has no end. By hand: libzmq would keep them here until the last."""
    liar.serve()
    wait()
    sock = liar.raw()
    part = b"\x03" + struct.pack(">Q", MIB) + bytes(MIB)
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(part)
    sleep()


def giant_message(liar: Liar) -> None:
    """A message that says it has 2^40 bytes."""
    liar.serve()
    wait()
    sock = liar.raw()
    sock.sendall(b"\x02" + struct.pack(">Q", 1 << 40))
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(bytes(MIB))
    sleep()


def giant_reply(liar: Liar) -> None:
    """An answer that just fits what core reads, and not what the controlplane does."""
    liar.serve()
    call = liar.hear(ToWorker.CALL)
    liar.say(ToCore.REPLY, id=call["id"], ok=bytes(4 * MIB - 100))
    sleep()


def nested_reply(liar: Liar) -> None:
    """An answer nested deeper than anyone reads."""
    liar.serve()
    call = liar.hear(ToWorker.CALL)
    head = pack({"k": ToCore.REPLY, "id": call["id"], "ok": 0})[:-1]
    liar.sock.send(head + b"\x91" * 900 + b"\x90")
    sleep()


def dense_hello(liar: Liar) -> None:
    """A HELLO of millions of empty lists."""
    inner = b"\xdc\x3f\xff" + b"\x90" * 0x3FFF
    outer = b"\xdc\x00\xf0" + inner * 0xF0
    liar.sock.send(b"\x82\xa1k\xa5hello\xa4spec" + outer)
    sleep()


def half_messages(liar: Liar) -> None:
    """Connections that stop in the middle: of the greeting, of READY, of a message."""
    liar.serve()
    wait()
    hello = zmtp.GREETING + zmtp.ready(b"DEALER", liar.identity.encode())
    kept = []
    for cut in (*range(1, len(hello)), len(hello) + 3):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(os.path.join(liar.run_dir, places.CORE))
        with contextlib.suppress(OSError):
            sock.sendall((hello + b"\x02" + struct.pack(">Q", 5000))[:cut])
        kept.append(sock)
    tell(len(kept))
    sleep()


def noise(liar: Liar) -> None:
    """Bytes that are no ZMTP, and ZMTP of other kinds."""
    liar.serve()
    wait()
    hello = zmtp.GREETING + zmtp.ready(b"DEALER", liar.identity.encode())
    pieces = [bytes(200), b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 300, hello[:12] + b"CURVE".ljust(52, b"\0"),
              hello[:64] + b"\x04\x05READX", hello[:64] + b"\x06" + struct.pack(">Q", 1 << 50),
              hello[:64] + b"\x04\x0b\x05READY\xff\xff\xff\xff\xff", zmtp.GREETING + zmtp.ready(b"DEALER"),
              zmtp.GREETING + zmtp.ready(b"PUB", b"honest/1/wrong"),
              zmtp.GREETING + zmtp.ready(b"DEALER", b"honest/1/wrong"),
              zmtp.GREETING + zmtp.ready(b"DEALER", b"\xff/1/")]
    for piece in pieces:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(os.path.join(liar.run_dir, places.CORE))
        sock.settimeout(20)
        with contextlib.suppress(OSError):
            sock.sendall(piece)
            while sock.recv(4096):
                pass
    tell(len(pieces))
    sleep()


def impostor(liar: Liar) -> None:
    """Speaks for others: another device, an earlier and a later generation, the controlplane, a wrong token."""
    liar.serve()
    wait()
    device, generation, token = liar.identity.split("/")
    for identity in (f"honest/1/{token}x", f"honest/2/{token}", f"{device}/0/{token}", f"{device}/2/{token}",
                     f"{device}/{generation}/", f"controlplane/1/{token}x", f"controlplane/2/{token}", "", "/" * 200):
        other = liar.dealer(identity or "x")
        other.send(pack({"k": ToCore.FAILED, "reason": "impostor"}))
        sock = liar.connect()
        fdpass.send(sock, {"identity": identity, "take": True})
        try:
            answer = fdpass.receive(sock)
        except ConnectionError:
            answer = None
        assert answer is None, f"{identity} was let in"
        sock.close()
    other_name = liar.connect()
    fdpass.send(other_name, {"identity": liar.identity, "get": "x"})
    with contextlib.suppress(OSError):
        assert fdpass.receive(other_name) is None, "a second connection was let in"
    tell("done")
    sleep()


# ---- silence

def deaf(liar: Liar) -> None:
    """Serves, and answers neither RESET nor PAUSE nor a ping."""
    liar.serve(echo=False)
    sleep()


def lets_go(liar: Liar, echo: str) -> None:
    """Closes everything and lives on, answering pings or not."""
    liar.serve(echo=bool(echo))
    wait()
    liar.sock.close()
    liar.fds.close()
    for fd in liar.given.values():
        os.close(fd)
    tell("gone")
    sleep()


def no_descriptors(liar: Liar) -> None:
    """HELLO, and then nothing."""
    liar.hello()
    sleep()


def _window(**more: Any) -> dict[str, Any]:
    return {"bar": 2, "offset": 0, "size": 4096, "kind": "file", "fd": "", "fd_offset": 0, "shmid": 0,
            "readonly": False, "config_fixup": -1, "data": b"", **more}


SPECS: tuple[Any, ...] = (
    None, [], {}, SPEC.as_wire() | {"queues": [3]}, SPEC.as_wire() | {"queues": [32768] * 65},
    SPEC.as_wire() | {"virtio_id": 0}, SPEC.as_wire() | {"virtio_id": 64}, SPEC.as_wire() | {"virtio_id": 1 << 63},
    SPEC.as_wire() | {"features": -1}, SPEC.as_wire() | {"config": bytes(5000)},
    SPEC.as_wire() | {"private_size": 1 << 40}, SPEC.as_wire() | {"title": "\x1b[2J"},
    SPEC.as_wire() | {"counters": ["x"] * 1000}, SPEC.as_wire() | {"windows": [{"bar": 0}]},
    SPEC.as_wire() | {"windows": [_window(size=1 << 39)]}, SPEC.as_wire() | {"windows": [_window(fd="none")]},
    SPEC.as_wire() | {"windows": [_window(kind="memory", fd="none", size=4096)]},
)


def specs(liar: Liar, which: str) -> None:
    """A Spec that cannot be, one of SPECS."""
    liar.hello(SPECS[int(which)])
    sleep()


def good(liar: Liar) -> None:
    """No lie at all: answers everything."""
    liar.behave()
    sleep()
