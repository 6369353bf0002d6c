"""VMs on other machines: `~/.config/cellvisor/remotes.toml` gives each a name.

    [web]
    address = "tcp://192.0.2.1:7300"     # --api of the VM
    server = "PUBLIC KEY OF THE VM"      # cellvisor keys show server, over there
    key = "laptop"                       # whose key to show: a name of cellvisor keys new, or a file
    events = 7301                        # port of the events, if it is not the next one
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from cellvisor.core.errors import NotFound, UsageError
from cellvisor.core.wire import keys
from cellvisor.core.wire.keys import Pair

KNOWN = ("address", "server", "key", "events")


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a VM is, who it must be, and who we are."""

    name: str
    host: str
    port: int
    events: int
    server: str
    key: str

    def pair(self) -> Pair:
        """Return our keys. Raises NotFound, UsageError."""
        try:
            return keys.read_pair(self.key)
        except NotFound as error:
            raise UsageError(f"{self.name}: {error}", hint="make one with cellvisor keys new") from None


def path() -> str:
    """Return the path of the file, which may not be there."""
    return os.path.join(keys.config_dir(), keys.REMOTES)


def names() -> list[str]:
    """Return the names of all. Raises UsageError for a file that is wrong."""
    return sorted(_table())


def besides(here: Collection[str]) -> tuple[list[str], str]:
    """Return the names that no VM `here` has, and what is wrong with the file, which hides nothing of this machine."""
    try:
        return [name for name in names() if name not in here], ""
    except UsageError as error:
        return [], str(error)


def find(name: str) -> Remote | None:
    """Return the one of that name, None if there is none. Raises UsageError naming file, key and value."""
    table = _table().get(name)
    return None if table is None else _read(path(), name, table)


def _table() -> dict[str, Any]:
    try:
        return keys.read_toml(path())
    except NotFound:
        return {}


def _read(file: str, name: str, table: Any) -> Remote:
    if not isinstance(table, dict):
        raise UsageError(f"{file}: {name} = {repr(table)[:60]} is no table", hint=f"write [{name}] and keys below it")
    for key in set(table) - set(KNOWN):
        raise UsageError(f"{file}: {name}: unknown key {key[:60]!r}", hint=f"known keys: {', '.join(KNOWN)}")
    address, server, key = (keys.text_of(file, table, each, f"{name}: ") for each in ("address", "server", "key"))
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not host or not colon or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UsageError(f"{file}: {name}: address = {address[:80]!r} is no address", hint="write tcp://HOST:PORT")
    events = table.get("events", int(port) + 1)
    if isinstance(events, bool) or not isinstance(events, int) or not 0 < events < 65536:
        raise UsageError(f"{file}: {name}: events = {repr(events)[:60]} is no port")
    whole = os.path.expanduser(key)
    return Remote(name, host, int(port), events, keys.check_public(file, f"{name}: server", server),
                  whole if "/" in whole else keys.key_file(key))
