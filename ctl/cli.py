"""`cellvisor VERB ...`: one file in ctl/commands is one verb; only the file of the verb that is used is loaded."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

EXIT_STATUS = """exit status:
  0  done
  1  refused or failed; the line on stderr says why
  2  the command line is wrong
  3  no such VM
  4  no answer in time, or the VM asks to try again
  5  adopt: its controlplane is alive
  130  Ctrl-C; what was asked for goes on
"""


def main() -> int:
    """Entry point of the `cellvisor` command."""
    argv = sys.argv[1:]
    if argv[:1] == ["run"]:
        become_controlplane(argv)
    from cellvisor.ctl import dispatch

    return dispatch.run(argv)


def become_controlplane(argv: list[str]) -> NoReturn:
    """Replace this process: the VM runs in the foreground of the terminal."""
    os.environ["CELLVISOR_BEGAN_NS"] = str(time.monotonic_ns())
    os.execv(sys.executable, [sys.executable, "-P", "-m", "cellvisor.controlplane", *argv])
