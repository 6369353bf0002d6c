"""The controlplane process: `python -m cellvisor.controlplane run FLAGS`, in the foreground of the terminal.

Core and nursery are started before the slow imports, so that all three come up at the same time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

from cellvisor.controlplane import flags as command_line
from cellvisor.controlplane import processes, rundir
from cellvisor.controlplane.terminal import Terminal
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, UsageError

BEGAN = "CELLVISOR_BEGAN_NS"  # CLOCK_MONOTONIC at the start of the command, for the report


def main(argv: list[str] | None = None, programs: processes.Programs | None = None) -> int:
    """Run one VM; return the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    began = os.environ.pop(BEGAN, "")
    moment = int(began) if began.isdecimal() else time.monotonic_ns()
    if arguments[:1] != ["run"]:
        sys.stderr.write("cellvisor: started wrongly (start VMs with cellvisor run)\n")
        return 2
    try:
        with _early_signals() as pending:
            return _run(arguments[1:], programs or processes.Programs(), pending, moment)
    except CellvisorError as error:
        sys.stderr.write(f"cellvisor: {error}\n")
        return 2
    except Exception as error:  # a mistake of ours; everything has been taken down on the way here
        log.get().debug("internal error", exc_info=True)
        sys.stderr.write(f"cellvisor: internal error: {type(error).__name__}: {error} (-vv tells more)\n")
        return 1


@contextlib.contextmanager
def _early_signals() -> Iterator[list[int]]:
    """Note signals instead of dying of them: from now on there are processes to end."""
    pending: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, frame: pending.append(number))
    yield pending


def _run(argv: list[str], programs: processes.Programs, pending: list[int], began: int) -> int:
    flags = command_line.parse(argv)
    try:
        log.setup("controlplane", flags.verbosity, flags.log_file)
    except OSError as error:
        raise UsageError(f"--log-file {flags.log_file}: {error.strerror}") from None
    logging = (flags.verbosity, os.path.abspath(flags.log_file) if flags.log_file else None)
    with contextlib.ExitStack() as stack:
        claimed = rundir.claim(flags.name)
        stack.callback(claimed.remove)
        terminal = Terminal()
        stack.callback(terminal.restore)

        def launch() -> tuple[str, processes.Child, processes.Child]:
            token = os.urandom(16).hex()
            core = processes.start_core(programs, claimed, token, *logging)
            stack.callback(_put_down, core)
            claimed.note(core=core.pid)
            nursery = processes.start_nursery(programs, claimed, core, *logging)
            stack.callback(_put_down, nursery)
            return token, core, nursery

        token, core, nursery = launch()

        import asyncio

        import uvloop

        from cellvisor.controlplane.supervisor import Ending, Supervisor

        async def supervise() -> Ending:
            return await Supervisor(flags, claimed, token, core, nursery, terminal, began, launch).run(pending)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            ending = runner.run(supervise())
    if ending.reason and ending.status in (1, 2):
        sys.stderr.write(f"cellvisor: {ending.reason}\n")
    return ending.status


def _put_down(child: processes.Child) -> None:
    """Kill a child that the supervisor did not end; nothing happens when it did."""
    if child.pidfd >= 0:
        child.kill()
        child.close()


if __name__ == "__main__":
    sys.exit(main())
