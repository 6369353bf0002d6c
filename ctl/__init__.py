"""The command line. The only package that prints, and the only one that imports rich."""

from __future__ import annotations

# At the repository root "import ctl" would work by accident and load a second copy of everything.
assert __name__ == "cellvisor.ctl", "import cellvisor.ctl, not ctl"
