"""`top` and `ls`: rates from two looks, order, columns that fit, keys; a VM that hangs or goes stalls nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError, NotFound
from cellvisor.core.wire import places
from cellvisor.ctl import dispatch, sampling, screen, toptable
from cellvisor.ctl.commands import ls
from cellvisor.ctl.errand import ask_all
from cellvisor.ctl.sampling import Look, Row, Sampler, Snapshot


def look(moment: float, cpu: float, counters: dict[str, int], generation: int = 1) -> Look:
    info = {"state": "Running", "core": {"vcpus": [{"cpu": 2 * cpu}, {}]},
            "processes": [{"role": "core", "pid": 1, "pss": 9, "cpu": cpu},
                          {"role": "worker", "pid": 2, "pss": 3, "cpu": cpu},
                          {"role": "passt", "device": "d", "pid": 3, "pss": 7, "cpu": 2 * cpu}]}
    device = {"id": "d", "type": "blk", "state": "serving", "pid": 2, "generation": generation}
    return Look(moment, info, [device], {"d": counters})


def test_rates_are_per_second_between_two_looks() -> None:
    before = look(10.0, 1.0, {"read_ops": 5, "write_ops": 0, "read_bytes": 4096, "busy_us": 100})
    now = look(12.0, 1.5, {"read_ops": 15, "write_ops": 10, "read_bytes": 4096 * 11, "busy_us": 500}, 3)
    *listed, helper = sampling.rows("web", now, before)
    found = {row.name: row for row in listed}
    assert list(found) == ["vcpu0", "vcpu1", "d", "core"]
    assert helper == Row("web", "passt", "d", pid=3, cpu=50.0, pss=7)
    assert toptable.cells(helper)[1:3] == ("d", "passt")
    assert (found["vcpu0"].cpu, found["vcpu0"].state, found["vcpu1"].cpu) == (50.0, "running", None)
    assert found["d"] == Row("web", "device", "d", "blk", "serving", 2, 25.0, 3, 10.0, 20480.0, 20.0, 2)
    assert (found["core"].cpu, found["core"].pss, found["core"].iops) == (25.0, 9, None)


def test_a_fresh_process_has_counted_from_zero() -> None:
    before = look(10.0, 1.0, {"read_ops": 1000, "read_bytes": 1000})
    device = sampling.rows("web", look(11.0, 1.0, {"read_ops": 7, "read_bytes": 70}), before)[2]
    assert (device.iops, device.bytes_per_second, device.latency) == (7.0, 70.0, None)
    assert sampling.rows("web", before, None)[2].iops is None


ROWS = [Row("b", "device", "x", cpu=1.0), Row("a", "core", "core", cpu=None), Row("a", "device", "y", cpu=9.0),
        Row("a", "vcpu", "vcpu0", cpu=5.0)]


@pytest.mark.parametrize(("order", "names"), [
    ("vm", ["vcpu0", "y", "core", "x"]), ("cpu", ["y", "vcpu0", "x", "core"]), ("name", ["core", "vcpu0", "x", "y"])])
def test_orders(order: str, names: list[str]) -> None:
    assert [row.name for row in toptable.ordered(ROWS, order)] == names


def test_narrow_windows_drop_the_columns_that_matter_least() -> None:
    table = [toptable.cells(row) for row in ROWS]
    assert len(toptable.fitting(table, 200)) == len(toptable.COLUMNS)
    narrow = [toptable.COLUMNS[number].strip() for number in toptable.fitting(table, 24)]
    assert narrow[0] == "NAME" and "IOPS" in narrow and "CPU%" in narrow and "TYPE" not in narrow


def test_keys() -> None:
    seen = Snapshot({"a": "Running", "b": "Paused"}, ROWS, {})
    one = screen.Screen()
    rows = one.shown(seen)
    assert [row.name for row in rows] == ["vcpu0", "y", "x"]
    assert rows[one.selected(rows)].name == "y"
    assert one.press("R", seen) == ("restart", rows[1])
    for key in screen.DOWN:
        one.press(key, seen)
    assert one.press("p", seen) == ("pause", rows[2])
    one.press("s", seen)  # by CPU now: the selection stays with its row
    rows = one.shown(seen)
    assert rows[one.selected(rows)].name == "x"
    one.press("a", seen)
    assert [row.name for row in one.shown(seen)] == ["y", "vcpu0", "x", "core"]
    assert one.press("p", None) == ("", None)
    assert one.press("?", seen) == ("", None)


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """20 VMs that live and never answer."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(ls, "PATIENCE", 0.5)
    monkeypatch.setattr(sampling, "PATIENCE", 0.5)
    names = [f"vm{number:02}" for number in range(20)]
    held = []
    for name in names:
        os.makedirs(places.vm_dir(name))
        held.append(os.open(os.path.join(places.vm_dir(name), places.LOCK), os.O_RDWR | os.O_CREAT))
        os.write(held[-1], b"pid 7\n")
        assert places.lock(held[-1])
    yield names
    for fd in held:
        os.close(fd)


def test_ls_lists_who_hangs(hanging: list[str], monkeypatch: pytest.MonkeyPatch,
                            capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert dispatch.run(["ls", "--json"]) == 0
    assert time.monotonic() - began < 0.5 * len(hanging), "they were asked one after the other"
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == hanging
    assert {(entry["pid"], entry["state"]) for entry in found} == {(7, "no answer")}
    assert all("no answer within" in entry["error"] for entry in found)
    alive = {**places.running(), "gone": {"pid": 8}}
    monkeypatch.setattr(places, "running", lambda: alive)
    assert dispatch.run(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", *hanging]
    assert lines[1].split() == ["vm00", "no", "answer", *"7-----"]


def test_top_goes_on_without_who_hangs(hanging: list[str]) -> None:
    sampler = Sampler(None, everyone=True)
    for _ in range(2):
        began = time.monotonic()
        seen = sampler.sample(0.1)
        assert time.monotonic() - began < 0.5 * len(hanging)
        assert seen.errors == dict.fromkeys(hanging, "no answer")
        assert toptable.title(seen).startswith("20 VMs: vm00 ?, ")
    end = time.monotonic() + 60
    while not any("no answer within" in error for error in sampler.sample(0.1).errors.values()):
        assert time.monotonic() < end
    sampler.close()


def test_what_is_asked_for_is_told(hanging: list[str]) -> None:
    row = Row(hanging[0], "device", "d", state="serving")
    assert screen._act(hanging[0], "restart", Row("a", "vcpu", "vcpu0"), False).startswith("vcpu0 is no device")
    assert screen._act("nobody", "pause", row, False).startswith(f"{hanging[0]}: no VM 'nobody' is running")


@pytest.mark.usefixtures("hanging")
def test_wrong_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "nan", "9999"):
        assert dispatch.run(["top", "--interval", text]) == 2
        assert "--interval" in capsys.readouterr().err


def test_an_errand_tells_every_error() -> None:
    def ask(name: str) -> str:
        if name == "gone":
            raise NotFound("no")
        return {"web": "yes"}[name]

    found = ask_all(["web", "gone", "odd"], ask, 60.0)
    assert found["web"] == "yes"
    assert isinstance(found["gone"], NotFound)
    assert isinstance(found["odd"], CellvisorError) and str(found["odd"]) == "KeyError: 'odd'"
