"""A worker's Spec is checked field by field: each lie is refused with the field's name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.core.errors import UsageError
from cellvisor.core.wire.messages import pack, unpack
from cellvisor.core.wire.spec import Spec, Window, WindowKind, spec_from_wire

GOOD = Spec(virtio_id=27, pci_class=0x050000, queues=(128, 64), features=1 << 63, config=b"\0" * 16,
            counters=("reads",), title="pmem", private_size=4096,
            windows=(Window(bar=2, offset=0, size=0x200000, kind=WindowKind.MEMORY, fd="backing", config_fixup=8),
                     Window(bar=2, offset=0x200000, size=0x1000, kind=WindowKind.BYTES, data=b"abc", shmid=1)))


def told(**changes: Any) -> dict[str, Any]:
    return unpack(pack(GOOD.as_wire())) | changes


def window(**changes: Any) -> dict[str, Any]:
    return told(windows=[told()["windows"][0] | changes])


def test_survives_the_wire() -> None:
    assert spec_from_wire(told()) == GOOD
    assert spec_from_wire(unpack(pack(Spec().as_wire()))) == Spec()


NESTED: Any = []
for _ in range(400):
    NESTED = [NESTED]


@pytest.mark.parametrize(("body", "field"), [
    (None, "not a map"), ([], "not a map"), ({}, "virtio_id"),
    (told(virtio_id=256), "virtio_id=0x100"), (told(virtio_id=True), "virtio_id is bool"),
    (told(virtio_id=-1), "virtio_id"), (told(features=2**64), "features"), (told(revision="1"), "revision"),
    (told(pci_class=1 << 24), "pci_class"), (told(private_size=(1 << 20) + 1), "private_size"),
    (told(config="text"), "config is str"), (told(config=b"x" * 4097), "4097 bytes"),
    (told(title=b"x"), "title"), (told(title="x" * 65), "title"), (told(title="a\nb"), "title"),
    (told(queues=7), "queues"), (told(queues=[1] * 65), "queues"), (told(queues=[3]), "queue size 3"),
    (told(queues=[0]), "queue size 0"), (told(queues=[65536]), "queue size"), (told(queues=[True]), "queue size bool"),
    (told(queues=[NESTED]), "queue size list"), (told(counters=[NESTED]), "counter"),
    (told(counters=["x"] * 65), "counters"), (told(counters=[""]), "counter"), (told(windows=[1]), "window"),
    (told(windows=[{}] * 17), "windows"), (told(windows={"a": 1}), "windows"), (window(extra=1), "window"),
    (window(kind="io"), "kind 'io'"), (window(kind=NESTED), "kind is list"), (window(bar=6), "bar"),
    (window(bar=0), "BAR 2"), (window(offset=-1), "offset"), (window(size=0), "size=0"), (window(size=1 << 41), "size"),
    (window(size=0x1001), "whole pages"), (window(fd_offset=1), "whole pages"), (window(fd=""), "names no fd"),
    (window(fd=3), "fd is int"), (window(readonly=1), "readonly"), (window(shmid=256), "shmid"),
    (window(config_fixup=9), "config_fixup=9"), (window(config_fixup=-2), "config_fixup"),
    (window(data="x"), "data is str"), (window(kind="bytes", size=1 << 21), "at most"),
    (window(kind="bytes", size=2, data=b"abc"), "size=2 for 3"),
    (told(windows=told()["windows"][:1] * 2), "overlap"),
])
def test_lies_are_refused_by_name(body: object, field: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec_from_wire(body)
    assert field in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


wild = st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5)
                    | st.binary(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=5)


@given(st.dictionaries(st.sampled_from(list(Spec.__slots__)), wild, max_size=3))
def test_any_change_gives_a_spec_or_usage_error(changes: dict[str, object]) -> None:
    try:
        spec = spec_from_wire(told(**changes))
    except UsageError:
        return
    assert spec_from_wire(spec.as_wire()) == spec


@given(st.dictionaries(st.sampled_from(list(Window.__slots__)), wild, min_size=1, max_size=2))
def test_any_change_of_a_window_gives_a_spec_or_usage_error(changes: dict[str, object]) -> None:
    try:
        spec = spec_from_wire(window(**changes))
    except UsageError:
        return
    assert spec_from_wire(spec.as_wire()) == spec
