"""A 16550A UART (PC16550D data sheet) whose transmitter is always done and whose receiver is fed by the host.

C answers LSR reads and takes THR writes itself while `FastPath` says that it may; the rest ends here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from cellvisor.core.abi import serial as reg
from cellvisor.core.board.bus import ByteDevice

SIZE: Final = 8
FIFO_DEPTH: Final = 64  # deeper than the chip's 16, which no driver can tell; fewer wake-ups while pasting
MAX_OUTPUT: Final = 1 << 20  # bytes that wait for the host; then the oldest go, as a terminal scrolls

_IDLE: Final = reg.LSR_HOLDING_EMPTY | reg.LSR_EMPTY
_LINES: Final = reg.MSR_CTS | reg.MSR_DSR | reg.MSR_DCD  # a peer that is always there
_DIVISOR_9600: Final = 12


class FastPath(Protocol):
    """The part of struct cv_board that Serial16550 keeps up to date."""

    serial_lsr: int
    serial_tx_fast: int


class Serial16550(ByteDevice):
    """One UART. Interrupt sources, highest priority first, and what ends each:

        line status (overrun)   LSR read               receive   FIFO empty
        transmitter empty       IIR read, or THR       modem     MSR read

    `sink(data)` writes to the host without blocking and returns how many bytes it took (None: all); it is
    only called from flush(). `irq(level)` is called when the interrupt line changes. `wake()` is called when
    output begins to wait, and asks for a flush() soon; without it every byte is flushed at once. `take_tx()`
    returns the bytes that C took, so that they keep their place in front of later ones. `on_room()` is
    called when the receiver has become empty: feed() more. All may run in a vCPU's thread, under the lock.
    """

    def __init__(self, sink: Callable[[bytes], int | None], irq: Callable[[bool], None], *,
                 fast: FastPath | None = None, take_tx: Callable[[], bytes] | None = None,
                 wake: Callable[[], None] | None = None, on_room: Callable[[], None] | None = None) -> None:
        self._sink = sink
        self._irq = irq
        self._fast = fast
        self._take_tx = take_tx
        self._wake = wake
        self._on_room = on_room
        self._received: deque[int] = deque()
        self._output = bytearray()
        self._level = False
        self.output_dropped = 0
        self.reset()

    def reset(self) -> None:
        """Go back to the power-on state; output that waits is kept."""
        self._received.clear()
        self._divisor = _DIVISOR_9600
        self._ier = self._lcr = self._mcr = self._msr_delta = self._scratch = 0
        self._fifo = False
        self._trigger = 1
        self._overrun = False
        self._thr_pending = False
        self._update()

    # --- the host's side ---------------------------------------------------------------------------

    def room(self) -> int:
        """Return how many bytes feed() would take now."""
        if self._mcr & reg.MCR_LOOP:
            return 0  # the receiver listens to the transmitter
        return max(0, self._depth() - len(self._received))

    def feed(self, data: bytes) -> int:
        """Receive `data` from the host; returns how many bytes were taken (see on_room for the rest)."""
        taken = min(self.room(), len(data))
        if taken:
            self._received.extend(data[:taken])
            self._update()
        return taken

    def flush(self) -> int:
        """Hand waiting output to the sink; returns how many bytes it left (flush again when it can take)."""
        self._collect()
        if self._output:
            chunk = bytes(self._output)
            taken = self._sink(chunk)
            del self._output[:len(chunk) if taken is None else max(0, taken)]
        return len(self._output)

    # --- the guest's side --------------------------------------------------------------------------

    def read8(self, offset: int) -> int:
        """Return a register (0..7)."""
        if self._lcr & reg.LCR_DLAB and offset in (reg.DLL, reg.DLM):
            return self._divisor >> 8 * offset & 0xFF
        match offset:
            case reg.RBR:
                return self._receive()
            case reg.IER:
                return self._ier
            case reg.IIR:
                return self._identify()
            case reg.LCR:
                return self._lcr
            case reg.MCR:
                return self._mcr
            case reg.LSR:
                status = self._line_status()
                self._overrun = False
                self._update()
                return status
            case reg.MSR:
                status = self._lines() | self._msr_delta
                self._msr_delta = 0
                self._update()
                return status
            case reg.SCR:
                return self._scratch
        return 0xFF

    def write8(self, offset: int, value: int) -> None:
        """Take `value` for a register (0..7); LSR and MSR are read-only."""
        if self._lcr & reg.LCR_DLAB and offset in (reg.DLL, reg.DLM):
            shift = 8 * offset
            self._divisor = self._divisor & ~(0xFF << shift) | value << shift
            return
        match offset:
            case reg.THR:
                self._transmit(value)
            case reg.IER:
                if value & ~self._ier & reg.IER_TRANSMIT:
                    self._thr_pending = True  # the transmitter is empty: enabling the interrupt raises it
                self._ier = value & 0x0F
            case reg.FCR:
                self._fifo_control(value)
            case reg.LCR:
                self._lcr = value
            case reg.MCR:
                self._modem_control(value)
            case reg.SCR:
                self._scratch = value
        self._update()

    # --- inside ------------------------------------------------------------------------------------

    def _depth(self) -> int:
        return FIFO_DEPTH if self._fifo else 1

    def _receive(self) -> int:
        if not self._received:
            return 0
        byte = self._received.popleft()
        self._update()
        if not self._received and self._on_room is not None:
            self._on_room()
        return byte

    def _transmit(self, byte: int) -> None:
        self._thr_pending = True
        if self._mcr & reg.MCR_LOOP:
            if len(self._received) < self._depth():
                self._received.append(byte)
            else:
                self._overrun = True
            return
        self._collect()
        first = not self._output
        self._output.append(byte)
        self._bound()
        if self._wake is None:
            self.flush()
        elif first:
            self._wake()

    def _collect(self) -> None:
        if self._take_tx is not None:
            self._output += self._take_tx()
            self._bound()

    def _bound(self) -> None:
        surplus = len(self._output) - MAX_OUTPUT
        if surplus > 0:
            del self._output[:surplus]
            self.output_dropped += surplus

    def _fifo_control(self, value: int) -> None:
        enable = bool(value & reg.FCR_ENABLE)
        if enable != self._fifo or value & reg.FCR_CLEAR_RECEIVE:
            self._received.clear()
        self._fifo = enable
        self._trigger = reg.TRIGGER_LEVELS[value >> reg.FCR_TRIGGER_SHIFT] if enable else 1
        if self._on_room is not None:
            self._on_room()

    def _modem_control(self, value: int) -> None:
        before, looped = self._lines(), self._mcr & reg.MCR_LOOP
        self._mcr = value & 0x1F
        changed = before ^ self._lines()
        self._msr_delta |= changed >> 4 & ~reg.MSR_RING_ENDED
        if changed & before & reg.MSR_RI:
            self._msr_delta |= reg.MSR_RING_ENDED
        if looped and not self._mcr & reg.MCR_LOOP and self._on_room is not None:
            self._on_room()

    def _lines(self) -> int:
        if not self._mcr & reg.MCR_LOOP:
            return _LINES
        wired = ((reg.MCR_DTR, reg.MSR_DSR), (reg.MCR_RTS, reg.MSR_CTS),
                 (reg.MCR_OUT1, reg.MSR_RI), (reg.MCR_OUT2, reg.MSR_DCD))
        return sum(line for output, line in wired if self._mcr & output)

    def _line_status(self) -> int:
        return (_IDLE | (reg.LSR_DATA if self._received else 0)
                | (reg.LSR_OVERRUN if self._overrun else 0))

    def _pending(self) -> int:
        if self._ier & reg.IER_LINE and self._overrun:
            return reg.IIR_LINE
        if self._ier & reg.IER_RECEIVE and self._received:
            # Below the trigger level the chip waits four characters' time; nothing is gained by waiting.
            return reg.IIR_RECEIVE if len(self._received) >= self._trigger else reg.IIR_TIMEOUT
        if self._ier & reg.IER_TRANSMIT and self._thr_pending:
            return reg.IIR_TRANSMIT
        if self._ier & reg.IER_MODEM and self._msr_delta:
            return reg.IIR_MODEM
        return reg.IIR_NONE

    def _identify(self) -> int:
        pending = self._pending()
        if pending == reg.IIR_TRANSMIT:
            self._thr_pending = False
            self._update()
        return pending | (reg.IIR_FIFO if self._fifo else 0)

    def _update(self) -> None:
        level = self._pending() != reg.IIR_NONE
        if level != self._level:
            self._level = level
            self._irq(level)
        if self._fast is not None:
            self._fast.serial_lsr = self._line_status()
            # While the transmitter interrupt is pending already, one more byte changes nothing.
            quiet = not self._ier & reg.IER_TRANSMIT or self._thr_pending
            blocked = self._lcr & reg.LCR_DLAB or self._mcr & reg.MCR_LOOP
            self._fast.serial_tx_fast = 1 if quiet and not blocked else 0
