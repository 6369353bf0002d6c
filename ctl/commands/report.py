"""cellvisor report."""

from __future__ import annotations

import argparse
import json

from cellvisor.core.errors import NotFound, UsageError
from cellvisor.ctl import common, render

HELP = "Show what `cellvisor run --report FILE` wrote when the VM ended."
EXAMPLE = "cellvisor report /tmp/web.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add FILE and --json."""
    parser.add_argument("file", metavar="FILE")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print processes and boot stages."""
    try:
        with open(options.file) as file:
            body = json.load(file)
        processes, stages = body["processes"], body["stages"]
    except FileNotFoundError:
        raise NotFound(f"{options.file}: no such file", hint="cellvisor run --report FILE makes one") from None
    except OSError as error:
        raise UsageError(f"{options.file} is not a report: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{options.file} is not a report: {error}",
                         hint="cellvisor run --report FILE makes one") from None
    if options.json:
        return common.show_json(body)
    print(f"{body['name']}: {body['end']}\n")
    render.process_tree(processes)
    print()
    render.stages(stages)
    return 0
