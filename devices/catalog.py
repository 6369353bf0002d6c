"""Which device types there are: files of devices/virtio and the entry-point group `cellvisor.devices`.

Only the nursery loads them; everybody else sees descriptions (schema, help). A plug-in that cannot be
imported, or whose class lacks a part of the contract, is reported and left out.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from cellvisor.core import log
from cellvisor.core.errors import NotFound, UsageError
from cellvisor.core.wire.options import describe
from cellvisor.devices import virtio

GROUP = "cellvisor.devices"


@dataclass(frozen=True, slots=True)
class Entry:
    """One device type: its class and the file that it came from."""

    name: str
    cls: type[Any]
    file: str

    def as_wire(self) -> dict[str, Any]:
        """Describe the type as plain data."""
        return {"verb": self.cls.verb, "help": self.cls.help, "schema": describe(self.cls.Options),
                "file": self.file, "reads": [int(version) for version in getattr(self.cls, "reads", (1,))]}


@dataclass(slots=True)
class Catalog:
    """Types by name, and for what could not be loaded the reason."""

    types: dict[str, Entry] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def get(self, name: object) -> Entry:
        """Return type `name`. Raises NotFound with the known names."""
        if not isinstance(name, str) or name not in self.types:
            reason = self.broken.get(str(name))
            known = f"known types: {', '.join(sorted(self.types))}"
            hint = f"it cannot be loaded: {reason}" if reason else known
            raise NotFound(f"unknown device type {str(name)[:64]!r}", hint=hint)
        return self.types[name]

    def as_wire(self) -> dict[str, Any]:
        """Describe every type as plain data: {types: {name: {verb, help, schema, file, reads}}, broken: {...}}."""
        return {"types": {name: entry.as_wire() for name, entry in self.types.items()}, "broken": self.broken}


def load() -> Catalog:
    """Import every device type that can be found; the project's own come first and cannot be replaced."""
    catalog = Catalog()
    for module in pkgutil.iter_modules(virtio.__path__):
        if not module.ispkg:
            path = f"{virtio.__name__}.{module.name}"
            _add(catalog, module.name, functools.partial(importlib.import_module, path))
    for point in importlib.metadata.entry_points(group=GROUP):
        _add(catalog, point.name, point.load)
    return catalog


def _add(catalog: Catalog, name: str, load_it: Any) -> None:
    # A plug-in may raise anything at import; it must not keep the other devices from starting.
    try:
        if name in catalog.types:
            raise UsageError(f"there is a type {name} already in {catalog.types[name].file}")
        found = load_it()
        cls = _device_class(found) if isinstance(found, ModuleType) else found
        entry = Entry(name, _checked(cls), inspect.getfile(cls))
        entry.as_wire()
        catalog.types[name] = entry
    except Exception as error:
        catalog.broken.setdefault(name, f"{type(error).__name__}: {error}")
        log.get("catalog").warning("device type %s: %s: %s", name, type(error).__name__, error)


def _device_class(module: ModuleType) -> type[Any]:
    found = [cls for cls in vars(module).values() if isinstance(cls, type)
             and cls.__module__ == module.__name__ and hasattr(cls, "on_queue")]
    if len(found) != 1:
        raise UsageError(f"{module.__name__} has {len(found)} classes with on_queue, not 1")
    return found[0]


def _checked(cls: Any) -> type[Any]:
    missing = [name for name in ("Options", "verb", "help", "spec", "on_queue", "on_reset", "close")
               if not hasattr(cls, name)]
    if not isinstance(cls, type) or missing:
        raise UsageError(f"{getattr(cls, '__name__', cls)} is no device class: no {', '.join(missing)}",
                         hint="see devices/device.py")
    return cls
