"""What a device is: the Spec that a worker sends in its Hello; core builds the PCI function from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from cellvisor.core.errors import UsageError

MAX_QUEUES = 64
MAX_QUEUE_SIZE = 32768
MAX_CONFIG = 4096
MAX_WINDOWS = 16
MAX_COUNTERS = 64
MAX_NAME = 64  # characters of a counter, a descriptor's name or the title
MAX_BYTES_WINDOW = 1 << 20  # core holds these bytes
PAGE = 4096


class WindowKind(StrEnum):
    """What lies behind a BAR window (design: bytes, doorbell, memory, file)."""

    BYTES = "bytes"
    DOORBELL = "doorbell"
    MEMORY = "memory"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Window:
    """One stretch of a BAR. `bar` 0..5, `offset` and `size` in bytes; `fd` names a deposited descriptor.

    On a virtio device bar must be 2 (BAR 0 is the transport's) and `shmid` gives the
    VIRTIO_PCI_CAP_SHARED_MEMORY_CFG id (virtio 1.2, 4.1.4.7). `config_fixup` is the offset in the
    device config where core stores the window's gpa as le64 (virtio-pmem), or -1.
    """

    bar: int
    offset: int
    size: int
    kind: str
    fd: str = ""
    fd_offset: int = 0
    shmid: int = 0
    readonly: bool = False
    config_fixup: int = -1
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Spec:
    """A device's identity and shape.

    Either `virtio_id` (virtio 1.2 section 5) or raw PCI ids (`vendor`, `device`). `pci_class` is 24 bits
    (class, subclass, interface). `queues` holds the largest size of each virtqueue, `features` the device's
    feature bits (transport bits are added by core), `config` the bytes of device config space.
    `private_size` is the room in the state memfd for the device's own recoverable state.
    """

    virtio_id: int = 0
    pci_class: int = 0xFF0000
    queues: tuple[int, ...] = ()
    features: int = 0
    config: bytes = b""
    windows: tuple[Window, ...] = ()
    private_size: int = 0
    vendor: int = 0x1AF4
    device: int = 0
    subsystem: int = 0
    revision: int = 1
    title: str = ""
    counters: tuple[str, ...] = field(default=())

    def as_wire(self) -> dict[str, Any]:
        """Return the map that HELLO carries."""
        return asdict(self)


_LIMITS = {"virtio_id": 0xFF, "pci_class": 0xFFFFFF, "features": 2**64 - 1, "private_size": 1 << 20,
           "vendor": 0xFFFF, "device": 0xFFFF, "subsystem": 0xFFFF, "revision": 0xFF}
_WINDOW_LIMITS = {"bar": 5, "offset": (1 << 40) - 1, "size": 1 << 40, "fd_offset": (1 << 62) - 1, "shmid": 255}


def spec_from_wire(body: object) -> Spec:
    """Check what a worker says of itself; it may lie. Raises UsageError naming the field."""
    if not isinstance(body, dict):
        raise UsageError(f"spec: not a map but {type(body).__name__}")
    values: dict[str, Any] = {key: _whole(body, key, limit) for key, limit in _LIMITS.items()}
    values["title"] = _text(body, "title")
    values["config"] = _bytes(body, "config", MAX_CONFIG)
    for size in (queues := _list(body, "queues", MAX_QUEUES)):
        if type(size) is not int or not 1 <= size <= MAX_QUEUE_SIZE or size & (size - 1):
            shown = size if type(size) is int else type(size).__name__
            raise UsageError(f"spec: queue size {shown} is not a power of two up to {MAX_QUEUE_SIZE}")
    for name in (counters := _list(body, "counters", MAX_COUNTERS)):
        if type(name) is not str or not 0 < len(name) <= MAX_NAME:
            raise UsageError(f"spec: a counter is no name of 1 to {MAX_NAME} characters")
    windows = tuple(_window(item) for item in _list(body, "windows", MAX_WINDOWS))
    spec = Spec(**values, queues=tuple(queues), counters=tuple(counters), windows=windows)
    _check_windows(spec)
    return spec


def _check_windows(spec: Spec) -> None:
    # What only shows when windows are seen together with each other and with the device.
    for index, window in enumerate(spec.windows):
        if spec.virtio_id and window.bar != 2:
            raise UsageError(f"spec: window bar={window.bar} on a virtio device, which has only BAR 2 for windows")
        if window.config_fixup >= 0 and window.config_fixup + 8 > len(spec.config):
            raise UsageError(f"spec: window config_fixup={window.config_fixup} is outside the "
                             f"{len(spec.config)} bytes of config")
        for other in spec.windows[:index]:
            apart = window.offset >= other.offset + other.size or other.offset >= window.offset + window.size
            if window.bar == other.bar and not apart:
                raise UsageError(f"spec: windows at {other.offset:#x} and {window.offset:#x} of BAR "
                                 f"{window.bar} overlap")


def _window(body: object) -> Window:
    if not isinstance(body, dict) or set(body) != set(Window.__slots__):
        raise UsageError(f"spec: a window is not a map of {', '.join(Window.__slots__)}")
    values: dict[str, Any] = {key: _whole(body, key, limit) for key, limit in _WINDOW_LIMITS.items()}
    values["config_fixup"] = _whole(body, "config_fixup", MAX_CONFIG - 8, least=-1)
    kind, fd, readonly = _text(body, "kind"), _text(body, "fd"), body["readonly"]
    if kind not in list(WindowKind):
        raise UsageError(f"spec: window kind {kind!r} is none of {', '.join(WindowKind)}")
    if type(readonly) is not bool:
        raise UsageError(f"spec: window readonly is {type(readonly).__name__}, not bool")
    window = Window(**values, kind=kind, fd=fd, readonly=readonly, data=_bytes(body, "data", MAX_BYTES_WINDOW))
    if not window.size or len(window.data) > window.size:
        raise UsageError(f"spec: window size={window.size} for {len(window.data)} bytes of data")
    if kind == WindowKind.BYTES and window.size > MAX_BYTES_WINDOW:
        raise UsageError(f"spec: window of kind bytes has size={window.size}, at most {MAX_BYTES_WINDOW}")
    if kind in (WindowKind.MEMORY, WindowKind.FILE) and not fd:
        raise UsageError(f"spec: window of kind {kind} names no fd")
    if kind == WindowKind.MEMORY and (window.offset | window.size | window.fd_offset) % PAGE:
        raise UsageError(f"spec: window of kind memory: offset={window.offset:#x} size={window.size:#x} "
                         f"fd_offset={window.fd_offset:#x} are not whole pages")
    return window


def _whole(body: dict[str, Any], key: str, limit: int, least: int = 0) -> int:
    value = body.get(key)
    if type(value) is not int:
        raise UsageError(f"spec: {key} is {type(value).__name__}, not int")
    if not least <= value <= limit:
        raise UsageError(f"spec: {key}={value:#x} is outside {least}..{limit:#x}")
    return value


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if type(value) is not str:
        raise UsageError(f"spec: {key} is {type(value).__name__}, not str")
    if len(value) > MAX_NAME or not (value.isprintable() or not value):
        raise UsageError(f"spec: {key} is not up to {MAX_NAME} printable characters")
    return value


def _bytes(body: dict[str, Any], key: str, limit: int) -> bytes:
    value = body.get(key)
    if type(value) is not bytes:
        raise UsageError(f"spec: {key} is {type(value).__name__}, not bytes")
    if len(value) > limit:
        raise UsageError(f"spec: {key} has {len(value)} bytes, at most {limit}")
    return value


def _list(body: dict[str, Any], key: str, most: int) -> list[Any]:
    value = body.get(key)
    if not isinstance(value, list | tuple) or len(value) > most:
        raise UsageError(f"spec: {key} must be a list of at most {most}")
    return list(value)
