"""The core process: `python -m cellvisor.core --run-dir DIR --token HEX --ready-fd N`, started by a controlplane.

It never spawns a process and knows no device type. It ends when told to, or when its controlplane dies before it
has recorded anything; from then on the VM runs on without one, and a successor adopts it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys

from cellvisor.core import log
from cellvisor.core.errors import CellvisorError
from cellvisor.core.machine import Machine
from cellvisor.core.server import Server
from cellvisor.core.verbs import Verbs
from cellvisor.core.wire.limits import raise_descriptors

SWITCH_INTERVAL = 1e-4  # a vCPU thread back from C must not wait 5 ms for the main thread's GIL


def main(argv: list[str] | None = None) -> int:
    """Serve one VM; return the exit status."""
    parser = argparse.ArgumentParser(prog="cellvisor.core")
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--log-file")
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--controlplane-pidfd", type=int)
    parser.add_argument("-v", dest="verbosity", action="count", default=0)
    options = parser.parse_args(argv)
    log.setup("core", options.verbosity, options.log_file)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_INTERVAL)
    raise_descriptors()  # two eventfds for each queue of each device
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write("cv-core")
    try:
        server = Server(options.run_dir, options.token)
        machine = Machine(server)
        server.bind(machine, Verbs(machine, server.custody, server.messages, server.store))
    except (CellvisorError, OSError) as error:
        sys.stderr.write(f"cellvisor: {error}\n")
        return 2
    if options.controlplane_pidfd is not None:
        _watch(options.controlplane_pidfd, server, machine)
    if options.ready_fd is not None:
        with contextlib.suppress(BrokenPipeError):  # the controlplane died meanwhile, which is watched
            os.write(options.ready_fd, b"1")
        os.close(options.ready_fd)
    try:
        server.reactor.run()
    finally:
        machine.close()
        server.close()
    return 0


def _watch(pidfd: int, server: Server, machine: Machine) -> None:
    """Without a recorded state there is nothing to adopt, and nothing to run on for."""
    os.set_inheritable(pidfd, False)

    def gone(events: int) -> None:
        server.reactor.remove(pidfd)
        os.close(pidfd)
        if server.custody.generation > 1:
            return  # a successor is here already
        if server.custody.blob:
            log.get("core").warning("the controlplane died: running on without one")
        else:
            log.get("core").warning("the controlplane died before there was anything to run: ending")
            machine.quit()

    server.reactor.add(pidfd, gone, select.EPOLLIN)


if __name__ == "__main__":
    sys.exit(main())
