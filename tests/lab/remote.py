"""Pytest plugin inside L1: run what the host asks for, send reports back as JSON lines over the channel.

    L1: {"collected": [ids]}   host: {"run": [ids]}   L1: {"start": id} {"report": {...}} ... {"done": n}
    host: {"end": 1} or the channel's end: the session finishes
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import pytest


class Remote:
    """Hooks of the session in L1."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._config: pytest.Config | None = None

    def send(self, message: dict[str, Any]) -> None:
        self._channel.sendall(json.dumps(message, default=str).encode() + b"\n")

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.send({"broken": report.nodeid, "text": report.longreprtext})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        self.send({"collected": list(items)})
        with self._channel.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line)
                if "run" not in request:
                    break
                chosen = [items[name] for name in request["run"] if name in items]
                for item, following in zip(chosen, [*chosen[1:], None], strict=True):
                    # The last one has no successor: fixtures of the module are torn down with it.
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                self.send({"done": len(chosen)})
        return True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.send({"start": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        assert self._config is not None
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self.send({"report": data})


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the hooks with the channel that the agent passed on."""
    number = os.environ.pop("CELLVISOR_LAB_CHANNEL", "")
    if number:
        pluginmanager.register(Remote(socket.socket(fileno=int(number))), "cellvisor-lab-remote")
