"""What is computed from samples: percentiles, and ratios of pairs with a bootstrap interval.

A machine that others use is fast at one moment and slow at the next, so only what was measured next to each other
is compared: pairs in the order A B B A, the ratio of each pair, the median of the ratios and its spread.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: what was measured, the figure with its unit, how far it varies, and a remark."""

    what: str
    figure: str
    spread: str = ""
    remark: str = ""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` (0 to 1) of all do not exceed; nan if there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def summary(values: Sequence[float], digits: int = 3) -> dict[str, float | int]:
    """Return count, min, p50, p99 and max."""
    found: dict[str, float | int] = {"count": len(values)}
    for name, share in (("min", 0.0), ("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        found[name] = round(percentile(values, share), digits)
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 1) -> dict[str, Any]:
    """Return the median of ours/theirs pair by pair, with the 95 % interval of a bootstrap over the pairs."""
    pairs = [one / other for one, other in zip(ours, theirs, strict=True) if other]
    if not pairs:
        return {"pairs": 0, "median": None, "low": None, "high": None}
    choose = random.Random(seed)
    medians = sorted(statistics.median(choose.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return {"pairs": len(pairs), "median": round(statistics.median(pairs), 4),
            "low": round(percentile(medians, 0.025), 4), "high": round(percentile(medians, 0.975), 4)}


def abba(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Return the order of each round: forwards, backwards, forwards ..., so that a drift hits all alike."""
    return [list(names) if number % 2 == 0 else list(reversed(names)) for number in range(rounds)]


def show_times(found: dict[str, Any], digits: int = 1) -> tuple[str, str]:
    """Format a summary of milliseconds as (figure, spread)."""
    return f"p50 {found['p50']:.{digits}f} ms", f"p99 {found['p99']:.{digits}f}, max {found['max']:.{digits}f}"


def show_ratio(found: dict[str, Any]) -> tuple[str, str]:
    """Format a ratio as (figure, spread)."""
    if found["median"] is None:
        return "-", ""
    return f"{found['median']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}"
