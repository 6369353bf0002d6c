"""What asking costs: round trips over ZeroMQ and HTTP, requests a second, and the start of the command line."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cellvisor.ctl.client import Client
from tests.bench.effort import Effort, Place
from tests.bench.figures import Row, show_times, summary

CLIENTS = 8
CELLVISOR = str(Path(sys.executable).with_name("cellvisor"))


def api(effort: Effort, place: Place) -> dict[str, Any]:
    """Ask a running VM `asks` times each way, then by `CLIENTS` connections at once; start `forks` commands."""
    socket = place.where / "http.sock"
    found: dict[str, Any] = {}
    with place.steer("test=boot end=stay", extra=("--api-socket", str(socket))) as vmm:
        run_dir = str(next((Path((place.where / "run").readlink()) / "cellvisor").iterdir()))
        for way, where in (("ZeroMQ", run_dir), ("HTTP", str(socket))):
            with Client(where) as client:
                for verb in ("ping", "info"):
                    place.tell(f"{verb} over {way}")
                    found[f"{verb} over {way}"] = summary(_times(lambda verb=verb: client.call(verb), effort.asks))
            found[f"{way} requests a second"] = round(_rate(where, effort.asks))
        for what, words in (("--version", ["--version"]), ("ping", ["ping", "--api-socket", run_dir]),
                            ("devices, as a table", ["devices", "--api-socket", run_dir])):
            place.tell(f"cellvisor {what}")
            found[f"cellvisor {what}"] = summary(_times(lambda words=words: _command(words), effort.forks))
        if vmm.running.process.poll() is not None:
            raise RuntimeError("the VM ended meanwhile")
    return found


def _times(ask: Callable[[], object], count: int) -> list[float]:
    ask()
    times = []
    for _ in range(count):
        began = time.perf_counter()
        ask()
        times.append((time.perf_counter() - began) * 1000)
    return times


def _rate(where: str, count: int) -> float:
    """Return pings answered a second with `CLIENTS` connections; they share this process, whose cost it includes."""
    def ask() -> None:
        with Client(where) as client:
            for _ in range(count // CLIENTS):
                client.call("ping")

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count // CLIENTS * CLIENTS / (time.perf_counter() - began)


def _command(words: list[str]) -> None:
    subprocess.run([CELLVISOR, *words], check=True, stdout=subprocess.DEVNULL, timeout=60)


def api_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    rows = []
    for what, value in found.items():
        if isinstance(value, dict):
            rows.append(Row(what, *show_times(value, 2), f"{value['count']} times"))
        else:
            rows.append(Row(what, f"{value}", "", f"{CLIENTS} connections"))
    return rows
