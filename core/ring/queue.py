"""A virtqueue as its device sees it: harvest chains, complete them, publish in batches."""

from __future__ import annotations


class Chain:
    """One descriptor chain.

    `head` is its descriptor index; `readable` and `writable` are lists of memoryviews into guest RAM, in
    order (guest memory may change under them at any time: copy what you check).
    """

    __slots__ = ("head", "readable", "readable_size", "writable", "writable_size")

    head: int
    readable: list[memoryview]
    writable: list[memoryview]
    readable_size: int
    writable_size: int

    def read(self, size: int = -1, offset: int = 0) -> bytes:
        """Copy `size` bytes (default: all) of the readable part from `offset`."""
        raise NotImplementedError

    def write(self, data: bytes | memoryview, offset: int = 0) -> int:
        """Copy `data` into the writable part at `offset`; returns how many bytes fitted."""
        raise NotImplementedError


class Queue:
    """The device side of one split virtqueue (virtio 1.2, 2.7)."""

    def harvest(self, limit: int = 0) -> list[Chain]:
        """Fetch every chain made available (at most `limit` if not 0): FREE -> FETCHED. Raises RingError."""
        raise NotImplementedError

    def complete(self, chain: Chain, written: int = 0) -> None:
        """`written` bytes are in the chain's writable part: FETCHED -> EXECUTED."""
        raise NotImplementedError

    def publish(self) -> None:
        """Publish every EXECUTED chain in one batch and interrupt the driver if it wants to know."""
        raise NotImplementedError
