"""What holds for every test."""

from __future__ import annotations

import signal

# Whoever is started in the background of a shell ignores SIGINT, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
