"""Policy, one process per VM: API, supervision, ids, slots, operations. Opens no guest memory."""

from __future__ import annotations

# At the repository root "import controlplane" would work by accident and load a second copy of everything.
assert __name__ == "cellvisor.controlplane", "import cellvisor.controlplane, not controlplane"
