"""A nursery whose workers sleep; its catalog has disk, network card, rng and console. Kills them when core dies.

CELLVISOR_FAKE holds JSON: {device: reason} under "fail" is what a trial finds.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from dataclasses import dataclass

from cellvisor.core.wire import fdpass
from cellvisor.core.wire.budget import LimitedOptions
from cellvisor.core.wire.messages import FromNursery, ToNursery, pack
from cellvisor.core.wire.options import DeviceOptions, describe, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk(LimitedOptions):
    path: str = option(path=True)
    readonly: bool = option(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rng(DeviceOptions):
    src: str = option("/dev/urandom", path=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Console(DeviceOptions):
    mode: str = option("tty", choices=("off", "null", "tty", "pty", "file", "socket"), bare=True)
    file: str | None = option(None, path=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Net(DeviceOptions):
    tap: str | None = option(None)
    fd: list[int] | None = option(None, min=3)
    num_queues: int = option(2, min=2)


CATALOG = {
    "types": {
        "blk": {"verb": "disk", "help": "", "schema": describe(Disk)},
        "net": {"verb": "net", "help": "", "schema": describe(Net)},
        "rng": {"verb": "rng", "help": "", "schema": describe(Rng)},
        "console": {"verb": "console", "help": "", "schema": describe(Console)},
    },
    "broken": {"bent": "SyntaxError: line 1"},
}


def main() -> int:
    parser = argparse.ArgumentParser()
    for flag in ("--socket", "--log", "--successor"):
        parser.add_argument(flag)
    for flag in ("--core-pidfd", "--ready-fd", "--controlplane-pidfd"):
        parser.add_argument(flag, type=int)
    parser.add_argument("-v", action="count")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = fdpass.listen(options.socket)
    listener.setblocking(True)
    os.write(options.ready_fd, b"\n")
    os.close(options.ready_fd)
    script = json.loads(os.environ.get("CELLVISOR_FAKE", "{}"))
    peer = None
    children: dict[int, tuple[str, int, int]] = {}
    while True:
        sources = [options.core_pidfd, *children, peer if peer is not None else listener]
        ready = select.select(sources, [], [])[0]
        if options.core_pidfd in ready:
            break
        if listener in ready:
            peer = listener.accept()[0]
            continue
        for pidfd in [fd for fd in ready if fd in children]:
            device, generation, pid = children.pop(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(pidfd)
            status = f"signal {-code}" if code < 0 else f"exit {code}"
            if peer is not None:
                fdpass.send(peer, {"k": FromNursery.EXITED, "device": device, "generation": generation,
                                   "pid": pid, "status": status})
        if peer is None or peer not in ready:
            continue
        packet = fdpass.receive(peer)
        if packet is None:
            peer = None
            continue
        body, fds = packet
        if body["k"] == ToNursery.QUIT:
            break
        if body["k"] == ToNursery.CATALOG:
            fdpass.send(peer, {"k": FromNursery.CATALOG, **CATALOG})
        elif body["k"] == ToNursery.TRY:
            os.write(fds[0], pack({"reason": script.get("fail", {}).get(body["device"], "")}))
            for fd in fds:
                os.close(fd)
        elif body["k"] == ToNursery.SPAWN:
            pid = os.fork()
            if pid == 0:
                os.closerange(3, 1000)
                os.execvp("sleep", ["sleep", "300"])
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (body["device"], body["generation"], pid)
            fdpass.send(peer, {"k": FromNursery.SPAWNED, "device": body["device"],
                               "generation": body["generation"], "pid": pid}, [pidfd])
    for _, _, pid in children.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
