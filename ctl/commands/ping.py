"""cellvisor ping."""

from __future__ import annotations

import argparse
import time

from cellvisor.ctl import common

HELP = "Tell whether a VM answers, and how fast."
EXAMPLE = "cellvisor ping web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    from cellvisor.ctl.client import Client

    with Client(options.vm, timeout=5.0) as client:
        began = time.perf_counter()
        answer = client.call("ping")
        took = (time.perf_counter() - began) * 1000
        if options.json:
            return common.show_json({**answer, "round_trip_ms": round(took, 3)})
        print(f"{answer['name']}: {answer['build_version']}, pid {answer['pid']}, {took:.1f} ms")
    return 0
