"""A stock Debian guest's card under iperf3, the real one, while the card's process is killed again and again.

TCP connections carry on. Datagrams are numbered: none comes twice or late, and a death costs each queue one at most.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from cellvisor.ctl.client import Client
from tests.lab import programs
from tests.lab.guest import Linux
from tests.lab.hotplug import client_of, device, eventually
from tests.lab.iperf import Interval, Iperf, Said
from tests.lab.net import CARE, MAC, Capture, Counts, configure, storm
from tests.native import netns
from tests.native.storm import Storm

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]

ADDRESS, TAP = "10.88.0.1", "chtap0"
BATCH = 10           # kills, then time for bytes to move
PACE = 0.8           # seconds for each, pauses included; doubled for a machine that needs more
MARGIN = 4.0         # seconds at the end of a run without kills
SIZE = 200           # bytes of a datagram
DATAGRAMS = f"--udp --length {SIZE} --bitrate 500K"
Stretch = tuple[float, float]  # from, to in seconds of a run


@dataclass(slots=True)
class Card:
    """A guest with iperf3 and one card, and how often the card's process was killed."""

    guest: Linux
    client: Client
    name: str  # in the guest
    kills: int = 0


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Card]:
    image = programs.make(tmp_path_factory.mktemp("guest") / "iperf3.img", "iperf3")
    options = f"tap={TAP},ip={ADDRESS},mask=255.255.255.0,mac={MAC % 1},id=net0,{CARE}"
    with netns.namespace(), Linux("cloud", disks=[f"path={image},readonly=on"], args=["--net", options]) as guest, \
            client_of(guest) as client:
        programs.install(guest, "vda", "iperf3")
        # Room for what comes during a pause, and for all of that at once.
        subprocess.run(["ip", "link", "set", TAP, "txqueuelen", "10000"], check=True)
        guest.run("echo 8388608 >/proc/sys/net/core/rmem_default")
        yield Card(guest, client, configure(guest, 0))


@dataclass(slots=True)
class Blows:
    """What was done to the card during one run."""

    kills: int = 0
    struck: list[Stretch] = field(default_factory=list)  # batches of kills, to the last one's successor
    calm: list[Stretch] = field(default_factory=list)    # after each batch


def is_served(card: Card, kills: int) -> bool:
    """Say that a process serves the card after so many more deaths."""
    now = device(card.client, "net0")
    return now["state"] == "serving" and now["generation"] > card.kills + kills


def strike(card: Card, iperf: Iperf, wind: Storm, most: int) -> Blows:
    """Kill in batches for as long as the run lasts, `most` times at most; after each, wait for bytes to move."""
    blows = Blows()
    iperf.wait_for(1.0)
    while blows.kills < most and iperf.clock() < iperf.seconds - MARGIN:
        began = iperf.clock()
        for _ in wind.blow(min(BATCH, most - blows.kills)):
            blows.kills += 1
            if iperf.clock() > iperf.seconds - MARGIN:
                break
        eventually(lambda: is_served(card, blows.kills), "the last one's successor")
        blows.struck.append((began, iperf.clock()))
        if calm := iperf.carries_on():
            blows.calm.append(calm)
    card.kills += blows.kills
    assert device(card.client, "net0")["generation"] == card.kills + 1, "each death was a kill"
    return blows


def amount(intervals: list[Interval], stretch: Stretch) -> int:
    """Return the bytes of the intervals that begin in a stretch."""
    return sum(size for begin, _, size in intervals if stretch[0] <= begin < stretch[1])


def rates(intervals: list[Interval], struck: list[Stretch]) -> tuple[float, float]:
    """Return Mbit/s under kills and without, by the intervals that kills touched and those they did not."""
    bits, seconds = [0.0, 0.0], [1e-9, 1e-9]
    for begin, end, size in intervals:
        quiet = not any(begin < until and since < end for since, until in struck)
        bits[quiet] += 8e-6 * size
        seconds[quiet] += end - begin
    return bits[0] / seconds[0], bits[1] / seconds[1]


def runs(card: Card, way: str, kills: int, options: str = "") -> Iterator[tuple[Blows, Said]]:
    """Run iperf3 under that many kills, once where the machine is fast enough; yields each run that ended well."""
    wind, pace, left, calm = storm(card.guest, card.client, "net0", kills), PACE, kills, False
    while left or not calm:
        with Iperf(card.guest, TAP, ADDRESS, way, int(6 + left * pace), options) as iperf:
            blows = strike(card, iperf, wind, max(1, left))
            said = iperf.result()
        for stretch in blows.calm:
            for intervals in said.arrivals():
                assert amount(intervals, stretch), f"nothing arrived in {stretch}: {intervals}"
        yield blows, said
        left, calm, pace = max(0, left - blows.kills), calm or bool(blows.calm), 2 * pace


@pytest.mark.parametrize(("way", "kills"), [
    ("both", 5), pytest.param("out", 50, marks=pytest.mark.slow), pytest.param("in", 50, marks=pytest.mark.slow)])
def test_iperf3_carries_on(card: Card, way: str, kills: int) -> None:
    before = Counts.of_guest(card.guest, card.name)
    for blows, said in runs(card, way, kills):
        after = Counts.of_guest(card.guest, card.name)
        streams = said.guest["start"]["connected"]
        assert after.since(before, "Tcp:ActiveOpens") == len(streams) + 1, "streams and control, none anew"
        figures = ["{:.1f} Mbit/s under kills, {:.1f} without".format(*rates(intervals, blows.struck))
                   for intervals in said.arrivals()]  # of two ways first what the guest gets
        print(f"TCP {way}, {blows.kills} kills in {sum(until - since for since, until in blows.struck):.0f} s: "
              f"{'; '.join(figures)}")
        before = after


def ascending(numbers: list[int]) -> bool:
    """Say that none is there twice, or behind a higher one."""
    return all(one < following for one, following in pairwise(numbers))


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_datagrams(card: Card, kills: int) -> None:
    """Numbers are seen at the tap and by iperf3 in the guest; both kernels count what the card took and gave."""
    guest, host = Counts.of_guest(card.guest, card.name), Counts.of_host(TAP)
    with Capture(TAP, SIZE) as capture:
        for blows, said in runs(card, "both", kills, DATAGRAMS):
            came, went = capture.take()
            sent, got = said.datagrams("guest", sender=True), said.datagrams("guest", sender=False)
            new_guest, new_host = Counts.of_guest(card.guest, card.name), Counts.of_host(TAP)
            took = new_guest.went - guest.went, new_host.went - host.went
            gave = new_host.came - host.came, new_guest.came - guest.came
            guest, host = new_guest, new_host

            assert ascending(came)
            assert ascending(went)
            # iperf3 expects each to be higher than all before: a second one would count here.
            assert not got["out_of_order"]
            assert came[-1] <= sent["packets"]
            assert min(len(came), got["packets"] - got["lost_packets"]) > 10 * blows.kills
            lost = took[0] - gave[0], took[1] - gave[1]  # by the card; on a slow machine others lose some, too
            assert max(lost) <= blows.kills
            print(f"UDP, {blows.kills} kills: of {took[0]} frames out {lost[0]} lost, of {took[1]} in {lost[1]}; of "
                  f"{sent['packets']} datagrams out {sent['packets'] - len(came)} did not come, of {got['packets']} in "
                  f"{got['lost_packets']}; none twice or late")
