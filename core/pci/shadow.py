"""The config shadow over struct cv_board: vCPU threads read it in C, without Python and without a lock."""

from __future__ import annotations

from typing import Any

from cellvisor.core._native import _native


class BoardShadow:
    """ports.ConfigShadow over a `struct cv_board *`."""

    def __init__(self, board: Any) -> None:
        self._board = board  # owns the memory
        self._config = [_native.ffi.buffer(row) for row in board.config]

    @property
    def config_address(self) -> int:
        return int(self._board.config_address)

    @config_address.setter
    def config_address(self, value: int) -> None:
        self._board.config_address = value

    def present(self, slot: int, on: bool) -> None:
        """Say whether there is a function in `slot`."""
        self._board.present[slot] = on

    def publish(self, slot: int, offset: int, data: bytes) -> None:
        """Store config bytes of `slot`."""
        self._config[slot][offset : offset + len(data)] = data

    def ask(self, slot: int, dword: int, on: bool) -> None:
        """Say whether Python answers reads of `dword`."""
        row, bit = self._board.ask[slot], 1 << dword % 8
        row[dword // 8] = row[dword // 8] | bit if on else row[dword // 8] & ~bit
