"""INTx lines shared between slots: a line is high while any slot asks for it (PCI 3.0, 2.2.6)."""

from __future__ import annotations

from collections.abc import Callable

from cellvisor.core.mem import layout


class IntxLines:
    """ports.LinePort over a function that drives an IOAPIC pin."""

    def __init__(self, irq_line: Callable[[int, bool], None]) -> None:
        """`irq_line(gsi, level)` is called on changes only; it is looked up afresh by whoever passes it."""
        self._irq_line = irq_line
        self._asking: dict[int, set[int]] = {}

    def drive(self, slot: int, level: bool) -> None:
        """Set what INTA# of `slot` asks for."""
        gsi = layout.intx_gsi(slot, 0)
        asking = self._asking.setdefault(gsi, set())
        before = bool(asking)
        if level:
            asking.add(slot)
        else:
            asking.discard(slot)
        if bool(asking) != before:
            self._irq_line(gsi, level)

    def forget(self) -> None:
        """Start with every line low: the VM is new."""
        self._asking.clear()
