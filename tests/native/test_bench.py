"""The benchmarks run, next to QEMU, and tell what they should: shape and arithmetic, never how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.debian import Missing, need
from tests.native import netns
from tests.native.guest import needs_kvm

try:
    need("qemu-system-x86_64", "qemu-system-x86")
    _lacking = ""
except Missing as missing:
    _lacking = str(missing)
pytestmark = [pytest.mark.kvm, needs_kvm, pytest.mark.skipif(bool(_lacking), reason=_lacking)]
ROOT = Path(__file__).resolve().parents[2]


def bench(tmp_path: Path, only: str) -> tuple[dict[str, Any], str]:
    """Run the quick benchmarks named; returns their JSON and their table."""
    report = tmp_path / "bench.json"
    done = subprocess.run([sys.executable, "-m", "tests.bench", "--quick", "--only", only, "--json", str(report)],
                          cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{only.split(',')[0]}: begins" in done.stderr
    return json.loads(report.read_text()), done.stdout


def test_comparison_with_qemu(tmp_path: Path) -> None:
    result, table = bench(tmp_path, "hello,blk")
    assert set(result) == {"effort", "machine", "seconds", "figures"}
    hello = result["figures"]["hello"]["hello_ms"]
    assert 0 < hello["min"] <= hello["p50"] <= hello["p99"] <= hello["max"]
    blk = result["figures"]["blk"]
    assert list(blk["cells"]) == ["read-1", "write-1", "read-8", "write-8", "read-32", "write-32"]
    for name, cell in blk["cells"].items():
        for peer, found in cell["ratios"].items():
            assert found["pairs"] == blk["rounds"] == 2
            assert 0 < found["low"] <= found["median"] <= found["high"]
            ours, theirs = ([one["iops"] for one in blk["samples"][who][name]] for who in ("cellvisor", peer))
            assert found["low"] <= ours[0] / theirs[0] + 1e-3 or found["low"] <= ours[1] / theirs[1] + 1e-3
            assert f"{found['median']:.2f}" in table
    assert "4 KiB random write, depth 32, ours : qemu-threads" in table


def test_steady_state_is_counted(tmp_path: Path) -> None:
    result, table = bench(tmp_path, "steady")
    one = result["figures"]["steady"]["32"]
    assert one["requests"] >= 2000
    assert (one["exits"], one["messages"]) == (0, 0)
    assert one["cpu_us"] > 0
    assert one["qemu-threads"]["cpu_us"] > 0
    assert "CPU time of the device per request, depth 32" in table


def test_memory_next_to_qemu(tmp_path: Path) -> None:
    result, table = bench(tmp_path, "footprint")
    memory = result["figures"]["footprint"]
    assert memory["processes"] == 5
    assert min(memory["ours"], memory["qemu"]) > 1024
    assert "PSS of the whole VM, ours : QEMU's" in table


@netns.needs_tap
def test_network_next_to_qemu_and_under_kills(tmp_path: Path) -> None:
    result, table = bench(tmp_path, "net")
    found = result["figures"]["net"]
    assert found["kills"] >= 2
    assert found["restart_ms"]["count"] >= 1
    for one in found["cells"].values():
        assert min(one["medians"].values()) > 0
        assert one["to_qemu"]["pairs"] == one["killed"]["pairs"] == found["rounds"] == 2
    assert "net, out, 1514 bytes, ours : QEMU's tap" in table
