"""16550A registers and bits (National Semiconductor PC16550D data sheet, section 8)."""

from __future__ import annotations

from typing import Final

# Offsets. With LCR.DLAB set, offsets 0 and 1 are the divisor latch.
RBR: Final = 0  # read: receive buffer
THR: Final = 0  # write: transmit holding register
DLL: Final = 0
IER: Final = 1
DLM: Final = 1
IIR: Final = 2  # read
FCR: Final = 2  # write
LCR: Final = 3
MCR: Final = 4
LSR: Final = 5
MSR: Final = 6
SCR: Final = 7

IER_RECEIVE: Final = 0x01
IER_TRANSMIT: Final = 0x02
IER_LINE: Final = 0x04
IER_MODEM: Final = 0x08

# IIR, highest priority first; bit 0 clear means pending.
IIR_LINE: Final = 0x06
IIR_RECEIVE: Final = 0x04
IIR_TIMEOUT: Final = 0x0C
IIR_TRANSMIT: Final = 0x02
IIR_MODEM: Final = 0x00
IIR_NONE: Final = 0x01
IIR_FIFO: Final = 0xC0

FCR_ENABLE: Final = 0x01
FCR_CLEAR_RECEIVE: Final = 0x02
FCR_TRIGGER_SHIFT: Final = 6
TRIGGER_LEVELS: Final = (1, 4, 8, 14)

LCR_DLAB: Final = 0x80

MCR_DTR: Final = 0x01
MCR_RTS: Final = 0x02
MCR_OUT1: Final = 0x04
MCR_OUT2: Final = 0x08
MCR_LOOP: Final = 0x10

LSR_DATA: Final = 0x01
LSR_OVERRUN: Final = 0x02
LSR_HOLDING_EMPTY: Final = 0x20
LSR_EMPTY: Final = 0x40

# MSR: the low four bits say which of the high four changed since the last read.
MSR_RING_ENDED: Final = 0x04
MSR_CTS: Final = 0x10
MSR_DSR: Final = 0x20
MSR_RI: Final = 0x40
MSR_DCD: Final = 0x80
