"""cellvisor info."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common, render

HELP = "Show state, configuration, devices and boot stages."
EXAMPLE = "cellvisor info web --json"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        answer = client.call("info", processes=options.json)
        if options.json:
            return common.show_json(answer)
    config = answer["config"]
    print(f"{answer['name']}: {answer['state']}, pid {answer['pid']}, up {answer['uptime']:.0f} s")
    print(f"  {config['cpus']['boot_vcpus']} vCPUs (at most {config['cpus']['max_vcpus']}), "
          f"{config['memory']['size'] >> 20} MiB, {config['payload']['kernel']}")
    for device in answer["device_tree"].values():
        print(f"  {device['pci_bdf']}  {device['id']}")
    render.stages(answer["stages"])
    return 0
