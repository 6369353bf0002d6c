"""The controlplane process, in the foreground of the terminal: `python -m cellvisor.controlplane run FLAGS`, or
`adopt NAME` for a VM whose controlplane died.

Core and nursery are started before the slow imports, so that all three come up at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from cellvisor.controlplane import flags as command_line
from cellvisor.controlplane import processes, rundir
from cellvisor.controlplane.flags import RunFlags
from cellvisor.controlplane.terminal import Terminal
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, UsageError
from cellvisor.core.wire import places
from cellvisor.core.wire.limits import raise_descriptors

if TYPE_CHECKING:
    from cellvisor.controlplane.supervisor import Ending

BEGAN = "CELLVISOR_BEGAN_NS"  # CLOCK_MONOTONIC at the start of the command, or when a successor was needed
NO_VM, IN_CHARGE = 3, 5       # exit statuses of adopt; a nursery understands the second


def main(argv: list[str] | None = None, programs: processes.Programs | None = None) -> int:
    """Run one VM; return the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    began = os.environ.pop(BEGAN, "")
    moment = int(began) if began.isdecimal() else time.monotonic_ns()
    what = {"run": _run, "adopt": _adopt}.get("".join(arguments[:1]))
    if what is None:
        sys.stderr.write("cellvisor: started wrongly (start VMs with cellvisor run)\n")
        return 2
    raise_descriptors()  # libzmq aborts the process when it cannot accept a client
    try:
        with _early_signals() as pending:
            ending = what(arguments[1:], programs or processes.Programs(), pending, moment)
    except CellvisorError as error:
        if "--as-successor" not in arguments or error.code not in ("in-charge", "no-vm"):
            sys.stderr.write(f"cellvisor: {error}\n")
        return {"in-charge": IN_CHARGE, "no-vm": NO_VM}.get(error.code, 2)
    except Exception as error:  # a mistake of ours; everything has been taken down on the way here
        log.get().debug("internal error", exc_info=True)
        sys.stderr.write(f"cellvisor: internal error: {type(error).__name__}: {error} (-vv tells more)\n")
        return 1
    if ending.reason and ending.status in (1, 2):
        sys.stderr.write(f"cellvisor: {ending.reason}\n")
    return ending.status


@contextlib.contextmanager
def _early_signals() -> Iterator[list[int]]:
    """Note signals instead of dying of them: from now on there are processes to end."""
    pending: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, frame: pending.append(number))
    yield pending


def _log_to(flags: RunFlags, claimed: rundir.RunDir) -> tuple[int, str]:
    path = os.path.abspath(flags.log_file) if flags.log_file else claimed.file(places.LOG)
    try:
        log.setup("controlplane", flags.verbosity, path)
    except OSError as error:
        raise UsageError(f"--log-file {path}: {error.strerror}") from None
    return flags.verbosity, path


def _run(argv: list[str], programs: processes.Programs, pending: list[int], began: int) -> Ending:
    flags = command_line.parse(argv)
    with contextlib.ExitStack() as stack:
        claimed = rundir.claim(flags.name)
        stack.callback(claimed.remove)
        logging = _log_to(flags, claimed)
        terminal = Terminal()
        stack.callback(terminal.restore)
        launcher = processes.Launcher(programs, claimed, *logging)
        stack.callback(launcher.put_down)
        core = launcher.core()
        nursery = launcher.nursery(core)

        async def supervise() -> Ending:
            from cellvisor.controlplane.supervisor import Supervisor

            return await Supervisor(flags, claimed, core, nursery, terminal, began, launcher).run(pending)

        return _loop(supervise)


def _adopt(argv: list[str], programs: processes.Programs, pending: list[int], began: int) -> Ending:
    parser = argparse.ArgumentParser(prog="cellvisor adopt", description="Steer a VM whose controlplane died.")
    parser.add_argument("name", metavar="VM")
    parser.add_argument("-v", dest="verbosity", action="count", default=0)
    parser.add_argument("--as-successor", action="store_true", help=argparse.SUPPRESS)  # a nursery says this
    parser.add_argument("--wait", action="store_true", help="while another steers the VM, wait to take its place")
    given = parser.parse_args(argv)
    log.setup("controlplane", given.verbosity)
    with contextlib.ExitStack() as stack:
        claimed = _adopt_in_turn(given.name, pending) if given.wait else rundir.adopt(given.name)
        stack.callback(claimed.let_go)

        async def supervise() -> Ending:
            from cellvisor.controlplane import adopt
            from cellvisor.controlplane.supervisor import Supervisor

            core = adopt.core_of(claimed)
            left = await adopt.take_over(claimed, began, stdio=given.as_successor)
            flags = left.record.flags
            launcher = processes.Launcher(programs, claimed, *_log_to(flags, claimed))
            stack.callback(launcher.put_down)
            nobodys = Terminal(-1)  # the guest's is our predecessor's, if any
            vm = Supervisor(flags, claimed, core, None, nobodys, left.record.began, launcher, left)
            return await vm.run(pending)

        return _loop(supervise)


def _adopt_in_turn(name: str, pending: list[int]) -> rundir.RunDir:
    """Adopt the VM as soon as nobody steers it. Raises NotFound when it has ended."""
    while not pending:
        try:
            return rundir.adopt(name)
        except Conflict as error:
            if error.code != "in-charge":
                raise
        time.sleep(0.2)
    raise SystemExit(128 + pending[0])


def _loop(supervise: Callable[[], Awaitable[Ending]]) -> Ending:
    import asyncio

    import uvloop

    async def run() -> Ending:
        return await supervise()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


if __name__ == "__main__":
    sys.exit(main())
