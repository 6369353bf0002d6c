"""What a network card refuses, and its receive filter by itself."""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.core.abi import net
from cellvisor.core.errors import UsageError
from cellvisor.core.wire.options import build
from cellvisor.devices.backends import tapcard
from cellvisor.devices.backends.netfilter import HEAD, MAX_ADDRESSES, MAX_STATE, Filter
from cellvisor.devices.backends.passt import is_wanted
from cellvisor.devices.backends.tap import Tap
from cellvisor.devices.virtio.net import Net
from tests.fakes.net import MAC


@pytest.mark.parametrize(("options", "message"), [
    ({"mac": "1:2:3:4:5:6"}, "mac=1:2:3:4:5:6 is not a MAC address"),
    ({"mac": "52:54:00:12:34"}, "mac=52:54:00:12:34 is not a MAC address"),
    ({"mac": "gg:54:00:12:34:56"}, "mac=gg:54:00:12:34:56 is not a MAC address"),
    ({"mac": "01:00:5e:00:00:01"}, "mac=01:00:5e:00:00:01 is not the address of one card"),
    ({"host_mac": "00:00:00:00:00:00"}, "host_mac=00:00:00:00:00:00 is not the address of one card"),
    ({"mask": "255.0.0.0"}, "mask=255.0.0.0 without ip"),
    ({"ip": "10.0.0.1"}, "ip=10.0.0.1 without mask"),
    ({"ip": "10.0.0.256", "mask": "255.0.0.0"}, "ip=10.0.0.256 is not an IP address"),
    ({"ip": "10.0.0.1", "mask": "255.0.255.0"}, "mask=255.0.255.0 is not a mask for ip=10.0.0.1"),
    ({"ip": "fd00::1", "mask": "255.0.0.0"}, "mask=255.0.0.0 is not a mask for ip=fd00::1"),
    ({"mtu": 1279}, "mtu=1279 is below 1280"),
    ({"num_queues": 3}, "num_queues=3 is odd"),
    ({"num_queues": 64}, "num_queues=64 is above 62"),
    ({"queue_size": 100}, "queue_size=100 is not a power of two"),
    ({"tap": "a/b"}, "tap='a/b' cannot name an interface"),
    ({"tap": "sixteen-letters-"}, "tap=sixteen-letters- has 16 bytes, at most 15"),
    ({"fd": [2]}, "fd.*2 is below 3"),
    ({"fd": [7, 8]}, r"fd=\[7, 8\]: 2 different descriptors for num_queues=2"),
    ({"fd": [7, 7], "num_queues": 4}, r"fd=\[7, 7\]: 1 different descriptors"),
    ({"fd": [7], "tap": "t"}, "tap=t does not go with fd"),
    ({"forward": ["tcp:2222:22"], "tap": "t"}, "forward=tcp:2222:22 is for passt alone"),
    ({"fd": [7]}, r"fd=\[7\]: no such descriptor came with it"),
])
def test_refusals_name_key_and_value(options: dict[str, Any], message: str) -> None:
    class Host:
        generation, trial = 1, False

        def take(self, name: str) -> None:
            return None

        def deposit(self, name: str, fd: int) -> None:
            pass

    with pytest.raises(UsageError, match=message) as caught:
        chosen = build(Net.Options, options)
        tapcard.check(chosen)
        tapcard.open_taps(chosen, Host())
    assert "\n" not in str(caught.value)


def test_empty_keys_are_missing_ones() -> None:
    """`tap=,mac=,ip=,mask=` asks for a new tap with the default address."""
    found = tapcard.filled(build(Net.Options, {"tap": "", "mac": "", "ip": "", "mask": ""}))
    assert (found.tap, found.mac, found.ip, found.mask) == ("", None, "192.168.249.1", "255.255.255.0")
    assert not is_wanted(found)
    tapcard.check(found)
    named = tapcard.filled(build(Net.Options, {"tap": "t", "ip": "", "mask": ""}))
    assert (named.tap, named.ip, named.mask) == ("t", None, None)
    given_ip = tapcard.filled(build(Net.Options, {"tap": "", "ip": "10.0.0.1", "mask": "255.0.0.0"}))
    assert (given_ip.ip, given_ip.mask) == ("10.0.0.1", "255.0.0.0")


def test_a_descriptor_that_is_no_tap_is_refused() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    with pytest.raises(UsageError, match=r"fd=\[3\]: not a tap .give a descriptor of a tap or macvtap"):
        Tap(null, "fd=[3]")
    os.close(null)


# ---- the filter by itself

ADDRESSES = st.lists(st.binary(min_size=6, max_size=6), max_size=MAX_ADDRESSES + 2)


@given(ADDRESSES, ADDRESSES, st.lists(st.integers(0, 4095), max_size=5), st.lists(st.integers(0, 5), max_size=6),
       st.lists(st.binary(min_size=HEAD, max_size=HEAD), min_size=1, max_size=5), st.booleans())
def test_a_filter_that_was_saved_is_the_same(single: list[bytes], groups: list[bytes], vlans: list[int],
                                             modes: list[int], heads: list[bytes], filtered: bool) -> None:
    one = Filter(MAC, vlans=filtered)
    tables = b"".join(struct.pack("<I", len(table)) + b"".join(table) for table in (single, groups))
    assert one.obey(net.CTRL_MAC, net.CTRL_MAC_TABLE_SET, tables)
    one.obey(net.CTRL_RX, net.CTRL_RX_PROMISC, b"\0")
    for number in vlans:
        assert one.obey(net.CTRL_VLAN, net.CTRL_VLAN_ADD, number.to_bytes(2, "little")) == filtered
    for mode in modes:
        assert one.obey(net.CTRL_RX, mode, b"\1")
    saved = one.pack()
    assert len(saved) <= MAX_STATE
    other = Filter.unpack(saved)
    assert other.pack() == saved
    assert [one.passes(head) for head in heads] == [other.passes(head) for head in heads]


@given(st.binary(max_size=MAX_STATE))
def test_what_is_no_saved_filter_is_refused_or_one(data: bytes) -> None:
    try:
        found = Filter.unpack(data)
    except ValueError:
        return
    assert len(found.pack()) <= MAX_STATE
