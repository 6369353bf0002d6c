"""cellvisor set-rate-limit."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Change how many bytes and requests a disk, a network card or a rate limit group may do; the guest runs on."
EXAMPLE = "cellvisor set-rate-limit web --disk _disk0 --limit bw_size=10M,bw_refill_time=1000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --disk, --net or --group, and --limit."""
    common.add_vm(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--disk", metavar="ID", help="the disk's name, see cellvisor devices")
    what.add_argument("--net", metavar="ID", help="or a network card's")
    what.add_argument("--group", metavar="ID", help="the name of a --rate-limit-group")
    parser.add_argument("--limit", required=True, metavar="KEY=N,...",
                        help="bw_size, bw_one_time_burst (bytes), ops_size, ops_one_time_burst, bw_refill_time, "
                             "ops_refill_time (ms); what is not given stays, a size of 0 is no limit")


def request(options: argparse.Namespace) -> common.Request:
    """Say what is asked for."""
    from cellvisor.core.wire.budget import KEYS, RateLimitArgs
    from cellvisor.core.wire.options import describe, parse_kv

    schema = describe(RateLimitArgs)
    schema["keys"] = {key: schema["keys"][key] for key in KEYS}
    limits = parse_kv(options.limit, schema, "--limit")
    return common.Request(options.vm, "set-rate-limit", {"id": options.disk or options.net, "group": options.group,
                                                         **limits})


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    asked = request(options)
    return common.change(options, asked, f"{asked.args['id'] or options.group} has {options.limit}")
