"""Tell one lie: `python -m tests.fakes.lie RUN_DIR IDENTITY DEED [ARGUMENT...]`, a process that core may kill."""

from __future__ import annotations

import contextlib
import sys

from tests.fakes import lies_shown, lies_told
from tests.fakes.liar import Liar


def main() -> None:
    run_dir, identity, deed, *arguments = sys.argv[1:]
    module = lies_told if hasattr(lies_told, deed) else lies_shown
    with contextlib.suppress(ConnectionError):
        getattr(module, deed)(Liar(run_dir, identity), *arguments)


if __name__ == "__main__":
    main()
