"""`cellvisor run` with the fake core and nursery beside this file."""

from __future__ import annotations

import os
import sys

from cellvisor.controlplane.__main__ import main
from cellvisor.controlplane.processes import Programs

HERE = os.path.dirname(os.path.abspath(__file__))

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]], Programs(
        core=(sys.executable, os.path.join(HERE, "control_core.py")),
        nursery=(sys.executable, os.path.join(HERE, "control_nursery.py")),
    )))
