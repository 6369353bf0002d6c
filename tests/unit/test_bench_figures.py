"""The arithmetic of the benchmarks: percentiles, pairs and their ratio, and what is read out of reports."""

from __future__ import annotations

import math
import random

import pytest

from tests.bench import blk, steady
from tests.bench.__main__ import SECTIONS, main
from tests.bench.effort import QUICK, Effort
from tests.bench.figures import abba, percentile, ratio, show_ratio, summary
from tests.native.guest import GuestResult
from tests.native.guest import parse as parse_guest
from tests.native.storm import longest_stalls


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.99) == 7.0
    assert math.isnan(percentile([], 0.5))
    assert summary([3, 1, 2]) == {"count": 3, "min": 1, "p50": 2, "p99": 3, "max": 3}


def test_ratio_compares_pairs_and_not_medians() -> None:
    # The machine slows down by half in every round: medians of each side would tell nothing of the pairs.
    theirs = [1000.0 / 2**number for number in range(10)]
    found = ratio([value * 0.7 for value in theirs], theirs)
    assert (found["pairs"], found["median"], found["low"], found["high"]) == (10, 0.7, 0.7, 0.7)


def test_the_interval_shows_the_noise() -> None:
    noise = random.Random(3)
    ours = [noise.uniform(0.5, 1.5) for _ in range(30)]
    wide, narrow = ratio(ours, [1.0] * 30), ratio([1 + (value - 1) / 100 for value in ours], [1.0] * 30)
    assert wide["low"] < wide["median"] < wide["high"]
    assert wide["high"] - wide["low"] > 50 * (narrow["high"] - narrow["low"])
    assert ratio(ours, [1.0] * 30) == wide, "the same samples give the same interval"
    assert show_ratio(wide)[0] == f"{wide['median']:.2f}"


def test_pairs_without_a_divisor_do_not_count() -> None:
    assert ratio([1.0, 4.0], [0.0, 2.0])["median"] == 2.0
    assert ratio([], [])["median"] is None
    assert show_ratio(ratio([], [])) == ("-", "")


def test_every_other_round_goes_backwards() -> None:
    assert abba(["a", "b", "c"], 3) == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


STRACE = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 91.87    0.048000          12      4000           preadv2
  3.00    0.001000           8       125         2 epoll_wait
  0.10    0.000001           1         1           brk
------ ----------- ----------- --------- --------- ----------------
100.00    0.052249          12      4126         2 total
"""


def test_strace_tables_are_read_per_request() -> None:
    assert steady.parse_strace(STRACE) == {"preadv2": 4000, "epoll_wait": 125, "brk": 1}
    assert steady.per_request(steady.parse_strace(STRACE)) == {"preadv2": 1.0, "epoll_wait": 0.0312}
    assert steady.per_request({"epoll_wait": 3}) == {}


def test_the_last_progress_counts() -> None:
    assert steady.progress("progress=10\nx=1\r\nprogress=250\r\nprogress=3") == 250


def said(effort: Effort, loads: int) -> GuestResult:
    lines = ["guest=1"]
    for number in range(loads):
        lines += ["test=blk-bench", f"depth={number}", "requests=100", f"iops={number * 1000}", "lat_p50_ns=2500",
                  "kicks=50", f"irqs={number * 25}", "test.us=5"]
    return parse_guest("\r\n".join([*lines, "result=ok", ""]))


def test_each_load_is_told_from_the_others_and_the_first_warms_up() -> None:
    effort = Effort(depths=(1, 32))
    found = blk.parse(said(effort, 5), effort)
    assert list(found) == ["read-1", "write-1", "read-32", "write-32"]
    assert [one["iops"] for one in found.values()] == [1000, 2000, 3000, 4000]
    assert found["write-1"] == {"iops": 2000, "p50_us": 2.5, "kicks": 0.5, "interrupts": 0.25}
    with pytest.raises(RuntimeError, match="3 of 4 loads"):
        blk.parse(said(effort, 4), effort)
    assert blk.cmdline(effort).count("blk-bench") == 5


def test_a_stall_is_one_of_the_longest_gaps() -> None:
    guest = parse_guest("gap.3000=2\ngap.9000=1\ngap.20000=2\nstall_us=20500\nresult=ok\n")
    assert longest_stalls(guest, 3) == [9.0, 20.0, 20.5]
    assert longest_stalls(parse_guest("stall_us=5\n"), 3) == []


def test_the_quick_effort_is_less_of_everything() -> None:
    full = Effort()
    assert all(getattr(QUICK, name) <= getattr(full, name)
               for name in ("kills", "forks", "boots", "requests", "cell_ms", "rounds", "seconds"))
    assert QUICK.depths == full.depths


def test_unknown_measurements_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--only", "blk,speed"])
    assert refused.value.code == 2
    told = capsys.readouterr().err
    assert "unknown speed" in told
    assert ", ".join(SECTIONS) in told
