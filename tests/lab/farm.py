"""Run groups of tests on L1 machines side by side and hand their reports to the pytest session of the host.

Each machine has a thread of its own: boot, start pytest in L1, then take the longest group that is left. A machine
that dies fails the test it was running, with its console, and a new one goes on with the rest. One whose heart stops
is the emulator's doing as a rule: the session says so and runs the test once more.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.debian import Missing
from tests.lab import recipe
from tests.lab.l1 import L1, Died, Hung, Job

TEST_SECONDS = 900  # after which pytest-timeout ends a test in L1: boots take long on a busy machine
SILENCE = TEST_SECONDS + 120.0  # pytest in L1 hangs
GUESS = 30.0  # seconds, for a test that never ran
MAX_BOOTS = 4  # of one machine's thread

Event = tuple[str, Any]


def groups(items: Sequence[pytest.Item]) -> list[list[pytest.Item]]:
    """Split into what must stay together: a module, or one test where the mark says lab(split=True)."""
    together: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("lab")
        split = mark is not None and mark.kwargs.get("split")
        together[item.nodeid if split else item.nodeid.partition("::")[0]].append(item)
    return list(together.values())


class Farm:
    """The machines of one pytest session."""

    def __init__(self, session: pytest.Session, items: Sequence[pytest.Item]) -> None:
        self._session = session
        self._hook = session.config.hook
        self._items = {item.nodeid: item for item in items}
        self._durations = _load_durations()
        self._waiting = sorted(([item.nodeid for item in group] for group in groups(items)), key=self._cost)
        self._lock = threading.Lock()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._machines: dict[str, L1] = {}
        self._stopping = False
        self._hung: set[str] = set()  # under these tests
        self._reported: set[str] = set()

    def run(self) -> None:
        """Run everything; reports reach the session's hooks from this thread only."""
        count = min(int(os.environ.get("CELLVISOR_LAB_MACHINES", 2)), os.cpu_count() or 1, len(self._waiting))
        threads = [threading.Thread(target=self._serve, args=(f"L1-{number}",)) for number in range(count)]
        for thread in threads:
            thread.start()
        try:
            left = count
            while left:
                kind, value = self._events.get()
                left -= kind == "gone"
                self._take(kind, value)
                if self._session.shouldfail or self._session.shouldstop:
                    break
        finally:
            self._stop()
            for thread in threads:
                thread.join()
            _save_durations(self._durations)
        if self._session.shouldfail:
            raise self._session.Failed(self._session.shouldfail)
        if self._session.shouldstop:
            raise self._session.Interrupted(self._session.shouldstop)
        for nodeid in self._items.keys() - self._reported:
            self._fail(nodeid, "no machine of the lab was left to run this test")

    # The host's thread.

    def _take(self, kind: str, value: Any) -> None:
        if kind == "start" and value in self._items:
            self._hook.pytest_runtest_logstart(nodeid=value, location=self._items[value].location)
        elif kind == "report":
            if isinstance(value["longrepr"], list):
                path, line, reason = value["longrepr"]  # a skip's; JSON knows no tuples
                value["longrepr"] = (path.replace("/cellvisor", str(recipe.CHECKOUT), 1), line, reason)
            report = self._hook.pytest_report_from_serializable(config=self._session.config, data=value)
            self._hook.pytest_runtest_logreport(report=report)
            self._reported.add(report.nodeid)
            spent = 0.0 if report.when == "setup" else self._durations.get(report.nodeid, 0.0)
            self._durations[report.nodeid] = round(spent + report.duration, 1)
        elif kind == "fail":
            self._fail(*value)
        elif kind == "note":
            self._note(value)

    def _fail(self, nodeid: str, why: str) -> None:
        item = self._items[nodeid]
        if nodeid not in self._reported:
            self._hook.pytest_runtest_logstart(nodeid=nodeid, location=item.location)
        report = pytest.TestReport(nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", why, "call")
        self._hook.pytest_runtest_logreport(report=report)
        self._reported.add(nodeid)

    def _note(self, text: str) -> None:
        reporter = self._session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"lab: {text}")

    # A machine's thread.

    def _serve(self, name: str) -> None:
        try:
            for _ in range(MAX_BOOTS):
                if self._stopping or not self._waiting or self._life(name):
                    break
        except Missing as error:
            self._events.put(("note", f"{name}: {error}"))
        finally:
            self._events.put(("gone", name))

    def _life(self, name: str) -> bool:
        """Live one machine's life. True when nothing is left to do, False if it died on the way."""
        group: list[str] = []
        running = ""
        try:
            machine = self._machines[name] = L1(name=name)
            with machine:
                self._events.put(("note", f"{name} booted in {machine.boot_seconds:.0f} s"))
                job = self._start_pytest(machine)
                while not self._stopping and (group := self._next_group()):
                    job.say(json.dumps({"run": group}))
                    done = False
                    while not done:
                        kind, value = self._listen(job)
                        done = kind == "done"
                        if kind == "start":
                            running = value
                        elif kind == "report" and value["when"] == "teardown" and value["nodeid"] in group:
                            group.remove(value["nodeid"])
                            running = ""
                        self._events.put((kind, value))
                    # What the session in L1 did not know is neither run nor lost without a word.
                    for nodeid in group:
                        self._events.put(("fail", (nodeid, "this test was not found in L1")))
                job.say(json.dumps({"end": 1}))
                return True
        except Died as error:
            if self._stopping:
                return True
            victim = running or (group[0] if group else "")
            if victim and isinstance(error, Hung) and victim not in self._hung:
                self._hung.add(victim)
                self._events.put(("note", f"{name} hung under {victim}, which runs once more: {error}"))
                self._requeue(group)
            elif victim:
                self._events.put(("fail", (victim, f"{name} died under this test: {error}")))
                self._requeue([nodeid for nodeid in group if nodeid != victim])
            else:
                self._events.put(("note", f"{name}: {error}"))
            return False

    def _start_pytest(self, machine: L1) -> Job:
        files = sorted({nodeid.partition("::")[0] for nodeid in self._items})
        # Plugins by name: found by themselves they would all have their asserts rewritten first, for 15 s.
        job = machine.job(["python3", "-m", "pytest", "-p", "tests.lab.remote", "-p", "pytest_timeout",
                           "-p", "no:cacheprovider", "-q", f"--timeout={TEST_SECONDS}", *files], channel=True,
                          env={"PYTHONPATH": "/cellvisor", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
        while True:
            kind, value = self._listen(job)
            if kind == "collected":
                return job
            if kind == "broken":
                for nodeid in [name for name in self._items if name.startswith(value["broken"])]:
                    self._events.put(("fail", (nodeid, f"not collected in L1:\n{value['text']}")))
                    self._forget(nodeid)

    def _listen(self, job: Job) -> Event:
        said = ""
        while True:
            kind, value = job.next(SILENCE)
            if kind == "said":
                message = json.loads(value)
                first = next(iter(message))
                return first, message if first == "broken" else message[first]
            if kind == "out":
                said += value
            if kind == "exit":
                raise Died(f"pytest in L1 ended with status {value}:\n{said[-4000:]}")

    def _next_group(self) -> list[str]:
        with self._lock:
            return self._waiting.pop() if self._waiting else []

    def _requeue(self, nodeids: list[str]) -> None:
        with self._lock:
            if nodeids:
                self._waiting.append(nodeids)
                self._waiting.sort(key=self._cost)

    def _forget(self, nodeid: str) -> None:
        with self._lock:
            self._waiting = [rest for group in self._waiting if (rest := [name for name in group if name != nodeid])]

    def _stop(self) -> None:
        self._stopping = True
        for machine in self._machines.values():
            machine.close()

    def _cost(self, nodeids: Sequence[str]) -> float:
        return sum(self._durations.get(nodeid, GUESS) for nodeid in nodeids)


def _durations_file() -> Path:
    return recipe.cache() / "durations.json"


def _load_durations() -> dict[str, float]:
    try:
        found = json.loads(_durations_file().read_text())
    except (OSError, ValueError):
        return {}
    return {str(name): float(spent) for name, spent in found.items()} if isinstance(found, dict) else {}


def _save_durations(durations: dict[str, float]) -> None:
    fresh = _durations_file().with_suffix(f".{time.monotonic_ns()}")
    fresh.write_text(json.dumps(durations, indent=0, sort_keys=True))
    fresh.rename(_durations_file())
