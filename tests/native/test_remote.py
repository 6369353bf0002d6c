"""A VM steered over TCP: its controlplane dies, and the successor listens there too."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire import keys
from cellvisor.ctl import remotes
from cellvisor.ctl.client import Client
from tests.native.guest import needs_kvm
from tests.native.owned import OwnedVm, wait_for
from tests.unit.test_remote import free_ports

pytestmark = [pytest.mark.kvm, needs_kvm]


def test_a_successor_serves_remote_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    server, laptop = (keys.make_pair(keys.key_file(name)).public for name in ("server", "laptop"))
    (tmp_path / "cellvisor" / "clients.toml").write_text(f'laptop = "{laptop}"\n')
    port = free_ports()
    Path(remotes.path()).write_text(
        f'[moon]\naddress = "tcp://127.0.0.1:{port}"\nserver = "{server}"\nkey = "laptop"\n')

    def steered() -> int:
        """Return the process that steers it, 0 if nobody answers."""
        try:
            with Client("moon", 5.0) as client:
                return int(client.call("ping")["pid"])
        except CellvisorError:
            return 0

    with OwnedVm(tmp_path, "test=hotplug", (), "--api", f"tcp://127.0.0.1:{port}") as vm:
        vm.running.wait_for("listening=1")
        first = wait_for(steered, "an answer over TCP")
        vm.kill_controlplane()
        vm.wait_adopted(2)
        second = wait_for(steered, "an answer of the successor over TCP")
        assert second != first
        with Client("moon") as client:
            client.call("pause")
            assert client.call("info")["state"] == "Paused"
            client.call("shutdown")
            assert client.wait_gone(60)
