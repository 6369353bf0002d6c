"""Hostile bytes against the message codec: one map comes out, or UsageError; nothing else, and quickly."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.core.errors import UsageError
from cellvisor.core.wire.messages import MAX_ITEMS, MAX_MESSAGE, ToCore, pack, unpack

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12)


@given(st.dictionaries(st.text(), plain, max_size=6))
def test_every_plain_map_survives(body: dict[str, object]) -> None:
    assert unpack(pack(body)) == body


@given(st.binary(max_size=200))
def test_random_bytes_give_a_map_or_usage_error(data: bytes) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(unpack(data), dict)


@pytest.mark.parametrize("data", [
    b"",
    b"\xc1",  # the one byte that msgpack never uses
    b"\x81\xa1k",  # cut in the middle
    pack({"k": 1}) + b"\x00",  # something after the map
    msgpack.packb([1, 2]),
    msgpack.packb("hello"),
    msgpack.packb({1: 2}),  # keys must be strings
    b"\x81\xa1\xff\x01",  # not UTF-8
    b"\x81\xa1k\xd4\x05\x00",  # an extension type
    b"\xdf\xff\xff\xff\xff",  # a map that claims 2^32 - 1 entries
    b"\x81\xa1k\xdd\xff\xff\xff\xff",
    b"\x81\xa1k\xc6\xff\xff\xff\xff",
    b"\x91" * 5000 + b"\xc0",  # deeper than any parser's stack
    b"\x00" * (MAX_MESSAGE + 1),
])
def test_bad_messages_are_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        unpack(data)


def test_nested_lists_that_claim_much_allocate_little() -> None:
    """Each header of five bytes may claim a list; without a limit this one claims 32 GB of pointers."""
    claim = b"\xdd" + (4_000_000).to_bytes(4, "big")
    with pytest.raises(UsageError):
        unpack((b"\x81\xa1k" + claim * 900).ljust(MAX_MESSAGE, b"\xc0"))


def test_lists_up_to_the_limit_pass() -> None:
    assert len(unpack(pack({"k": [0] * MAX_ITEMS}))["k"]) == MAX_ITEMS
    with pytest.raises(UsageError):
        unpack(pack({"k": [0] * (MAX_ITEMS + 1)}))


def test_kinds_travel_as_plain_strings() -> None:
    kind = unpack(pack({"k": ToCore.HELLO}))["k"]
    assert kind == "hello"
    assert type(kind) is str
