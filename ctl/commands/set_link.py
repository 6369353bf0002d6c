"""cellvisor set-link."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Pull a network card's cable, put it in, or have the guest announce itself."
EXAMPLE = "cellvisor set-link web --net _net2 --link down"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --net and --link."""
    common.add_vm(parser)
    parser.add_argument("--net", required=True, metavar="ID", help="the card's name, see cellvisor devices")
    parser.add_argument("--link", required=True, choices=("up", "down", "announce"), help="what to do")


def request(options: argparse.Namespace) -> common.Request:
    """Say what is asked for."""
    return common.Request(options.vm, "set-link", {"id": options.net, "link": options.link})


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        answer = request(options).put(client)
        if options.json:
            return common.show_json(answer)
        print(f"{client.name}: the link of {options.net} is {answer['link']}")
    return 0
