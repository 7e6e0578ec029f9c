"""Cases timed with stock runs around them or in turn with them, and what they are as multiples of those."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

BETWEEN_STOCK = 2


class Timed(Protocol):
    """A case: its runs, and for each the stock runs before and after it (the same one, if it was taken in turn)."""

    taken: list[Any]
    around: list[tuple[Any, Any]]


C = TypeVar("C", bound=Timed)


def time_round(found: Sequence[C], stock: Callable[[], Any], run: Callable[[C], Any]) -> None:
    """Times every case once, with stock runs around every ``BETWEEN_STOCK`` of them."""
    before = stock()
    for start in range(0, len(found), BETWEEN_STOCK):
        group = found[start : start + BETWEEN_STOCK]
        taken = [run(case) for case in group]
        after = stock()
        for case, one in zip(group, taken, strict=True):
            case.taken.append(one)
            case.around.append((before, after))
        before = after


def time_in_turn(found: Sequence[C], run: Callable[[C], Any]) -> None:
    """Times every case once, by runs that bring the stock run taken in turn with them (``stock``)."""
    for case in found:
        taken = run(case)
        case.taken.append(taken)
        case.around.append((taken.stock, taken.stock))


def time_rounds(
    found: Sequence[C], rounds: int, run: Callable[[C], Any], stock: Callable[[], Any] | None = None
) -> None:
    """Rounds in rotating order, with ``stock`` around the cases, or in turn with each."""
    for number in range(rounds):
        first = number * BETWEEN_STOCK % len(found)
        order = [*found[first:], *found[:first]]
        if stock is None:
            time_in_turn(order, run)
        else:
            time_round(order, stock, run)


def ratio(
    case: Timed, read: Callable[[Any], float], of_stock: Callable[[Any], float] | None = None
) -> dict[str, float]:
    """Median of what ``read`` gives of a case's runs, in seconds and over the mean of the stock runs around each.

    Args:
        of_stock: what to read of the stock runs; by default the same.
    """
    values = [read(taken) for taken in case.taken]
    units = [statistics.fmean(map(of_stock or read, pair)) for pair in case.around]
    ratios = [value / unit for value, unit in zip(values, units, strict=True)]
    return {"median_s": statistics.median(values), "ratio": statistics.median(ratios)}


def document(
    bench: str, env: Any, shapes: Sequence[Any], rounds: int, steps: int, clock: str, threads: int | None
) -> dict[str, Any]:
    """The JSON-ready result of a bench whose cases are paired with stock."""
    return {
        "format": 1,
        "bench": bench,
        "env": env,
        "protocol": {
            "rounds": rounds,
            "decode_steps": steps,
            "threads": threads,
            "clock": clock,
            "warm_up": "one stock run",
        },
        "shapes": shapes,
        "valid": all(shape["valid"] for shape in shapes),
    }


def decode_ratio(case: Timed) -> dict[str, float]:
    """Median decode step of a case's runs, in seconds and over the stock steps taken in turn with each."""
    return {
        "median_s": statistics.median(taken.decode for taken in case.taken),
        "ratio": statistics.median(taken.decode / taken.stock_decode for taken in case.taken),
    }
