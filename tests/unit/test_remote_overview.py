"""`ls` and `top` with VMs on other machines: one that answers, and others that refuse, hang or are not there."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.wire import keys, places
from cellvisor.ctl import dispatch, remotes, sampling, screen, toptable
from cellvisor.ctl.sampling import Sampler
from tests.unit import test_remote
from tests.unit.test_remote import Far, connect, free_ports, write_remotes

far = test_remote.far


@pytest.fixture
def sky(far: Far) -> Iterator[None]:
    """moon answers, mars refuses our key, venus hangs, pluto is not there, and hell is not written as it should be."""
    write_remotes(far)
    with connect() as client:
        while client.call("info")["state"] != "Running":
            pass
    known = Path(remotes.path()).read_text()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, key, port in (("mars", "thief", far.port), ("venus", "laptop", silent.getsockname()[1]),
                                ("pluto", "laptop", free_ports()), ("hell", "nobody", 1)):
            known += f'[{name}]\naddress = "tcp://127.0.0.1:{port}"\nserver = "{far.server}"\nkey = "{key}"\n'
        Path(remotes.path()).write_text(known)
        yield


STATES = {"hell": "misconfigured", "mars": "refused", "moon": "Running", "pluto": "no answer", "venus": "no answer"}
SAID = {"hell": "nobody.key: no such file", "mars": "refused: it does not know the public key",
        "pluto": "nobody answers at tcp://127.0.0.1:", "venus": "nobody answers at tcp://127.0.0.1:"}


@pytest.mark.usefixtures("sky")
def test_ls_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.run(["ls", "--json"]) == 0
    out, err = capsys.readouterr()
    found = {entry["name"]: entry for entry in json.loads(out)}
    assert {name: entry["state"] for name, entry in found.items()} == STATES
    assert found["moon"]["vcpus"] == 1
    lines = err.splitlines()
    assert len(lines) == len(SAID)
    for line, (name, said) in zip(lines, SAID.items(), strict=True):
        assert line.startswith(name) and said in line
        assert line.count(f"{name}: ") == 1
    assert dispatch.run(["ls", "--local", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.usefixtures("sky")
def test_top_has_a_row_for_each_and_waits_for_nobody_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(None, everyone=True)
    try:
        seen = sampler.sample(60.0)
        assert seen.states["moon"] == "Running"
        assert seen.errors.keys() == SAID.keys()
        assert all(said in seen.errors[name] for name, said in SAID.items())
        rows = screen.Screen().shown(seen)
        assert {row.vm: row.state for row in rows if row.name == "-"} == dict.fromkeys(SAID, "no answer")
        assert {row.vm for row in rows if row.kind == "device"} == {"moon"}
        assert ("pluto", "-", "vm", "no answer") in [toptable.cells(row)[:4] for row in rows]
        monkeypatch.setattr(sampling, "PATIENCE", 60.0)  # longer than any attempt to connect
        again = sampler.sample(600.0)
        assert again.states["moon"] == "Running"
        assert {"venus", "pluto"} <= {name for name, error in again.errors.items() if error == "no answer"}
        assert (sampler.where("moon"), sampler.where("web")) == ("moon", places.vm_dir("web"))
    finally:
        sampler.close()


def test_a_file_that_is_wrong_hides_nothing_of_this_machine(far: Far, capsys: pytest.CaptureFixture[str]) -> None:
    Path(remotes.path()).write_text("[moon")
    assert dispatch.run(["ls", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert remotes.path() in err and err.count("\n") == 1
    assert dispatch.run(["top", "--once", "--interval", "0.1"]) == 0
    assert remotes.path() in capsys.readouterr().err


def test_a_vm_here_and_a_remote_of_the_same_name(far: Far, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """The one here is listed; who names it is told that there are two."""
    base = far.allow.parents[1]
    write_remotes(far)
    connect().close()
    Path(remotes.path()).write_text(Path(remotes.path()).read_text().replace("[moon]", "[web]"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    assert keys.config_dir().startswith(str(base))
    assert dispatch.run(["ls", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(entry["name"], entry["state"]) for entry in found] == [("web", "Running")]
    assert dispatch.run(["top", "--once", "--interval", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["states"] == {"web": "Running"}
    assert dispatch.run(["ping", "web"]) == 2
    assert "runs here, and is a name in" in capsys.readouterr().err
