"""cellvisor top."""

from __future__ import annotations

import argparse
import sys

from cellvisor.core.errors import UsageError
from cellvisor.ctl import common, render

HELP = "Watch vCPUs and device processes: CPU, memory, IOPS, throughput, latency, restarts."
EXAMPLE = "cellvisor top web"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --once, --interval and --json."""
    parser.add_argument("vm", nargs="?", metavar="VM", help="name or path; all if none is given, with remotes.toml")
    parser.add_argument("--once", action="store_true", help="print one table (as when stdout is no terminal)")
    parser.add_argument("--interval", type=common.seconds, default=1.0, metavar="SECONDS", help="between two looks (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    """Show it on the whole screen, or print it."""
    from cellvisor.ctl import screen, toptable
    from cellvisor.ctl.client import named_socket
    from cellvisor.ctl.sampling import Sampler

    if not 0.1 <= options.interval <= 3600:
        raise UsageError(f"--interval {options.interval:g}: not between 0.1 and 3600 seconds")

    def make() -> Sampler:
        return Sampler(options.vm, everyone=options.vm is None and not named_socket())

    if not options.json and not options.once and sys.stdout.isatty() and sys.stdin.isatty():
        return screen.run(make, options.interval)
    seen = screen.once(make, options.interval)
    if options.json:
        return common.show_json(seen.as_json())
    render.table(toptable.COLUMNS, [toptable.cells(row) for row in toptable.ordered(seen.rows, "vm")])
    for name, error in seen.errors.items():
        print(f"{name}: {error}", file=sys.stderr)
    return 0

