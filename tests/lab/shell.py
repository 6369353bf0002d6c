"""`make lab`: a shell in L1 on this terminal, the checkout in /cellvisor. `-c COMMAND` runs one command instead."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator

from tests.debian import Missing
from tests.lab.l1 import L1, Died


def main(argv: list[str]) -> int:
    """Return the status of the command, or of QEMU."""
    try:
        if argv[:1] == ["-c"] and len(argv) == 2:
            with L1() as machine:
                return machine.run(["bash", "-c", argv[1]], timeout=3600,
                                   output=lambda text: print(text, end="", flush=True))[0]
        if argv:
            print("usage: python -m tests.lab.shell [-c COMMAND]", file=sys.stderr)
            return 2
        return _interact()
    except (Missing, Died) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _interact() -> int:
    size = _terminal_size()
    machine = L1(cmdline=f"lab.shell lab_columns={size[0]} lab_rows={size[1]}")
    print("lab: booting (about 10 s); `exit` ends the machine, Ctrl-A X kills it", file=sys.stderr, flush=True)
    try:
        with _raw_terminal():
            return subprocess.run([*machine.command(), "-nographic", "-serial", "mon:stdio"], check=False).returncode
    finally:
        machine.close()


def _terminal_size() -> tuple[int, int]:
    try:
        return termios.tcgetwinsize(0)[::-1]
    except (termios.error, OSError):
        return (80, 25)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    # QEMU sets the terminal itself, but does not put it back when it is killed.
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
