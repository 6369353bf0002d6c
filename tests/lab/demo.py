"""`make demo`: boot Debian under cellvisor wherever it can run, setting up what that takes."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.debian import Missing
from tests.lab import image, place
from tests.lab.l1 import L1, Died, Hung
from tests.lab.recipe import CHECKOUT

PROGRAM = "deploy/demo/demo.py"


def main() -> int:
    """Return the demo's exit status; 2 if it could not be set up."""
    where = place.find()
    try:
        if where.direct:
            print(f"demo: runs directly on this machine: {where.why}", flush=True)
            environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "CELLVISOR_LAB_GUESTS": str(image.guests())}
            return subprocess.run([sys.executable, str(CHECKOUT / PROGRAM)], env=environment, check=False).returncode
        print(f"demo: runs in the nested lab, an emulated machine: {where.why}\n"
              "demo: times are those of emulation, ten to fifty times those of a real processor", flush=True)
        image.l1()
        return _in_lab()
    except (Missing, Died, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _in_lab() -> int:
    """Return the demo's exit status in L1; in another one if the first hangs, as emulation does at times."""
    try:
        return _in_machine()
    except Hung as error:
        print(f"demo: the emulated machine hangs, so all of it runs once more in another one: {error}", flush=True)
        return _in_machine()


def _in_machine() -> int:
    print("demo: booting the lab's machine", flush=True)
    with L1() as machine:
        print(f"demo: it is up after {machine.boot_seconds:.0f} s", flush=True)
        status, _ = machine.run(["python3", PROGRAM], env={"PYTHONPATH": "/cellvisor"}, timeout=300,
                                output=lambda text: print(text, end="", flush=True))
        return status


if __name__ == "__main__":
    sys.exit(main())
