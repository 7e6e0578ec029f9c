"""Ratios that every scorer shares; a zero denominator gives 0 (official scripts divide by zero there)."""

from __future__ import annotations

__all__ = ["f1_score", "ratio", "retrieval"]


def ratio(top: float, bottom: float) -> float:
    """``top / bottom``, and 0 where ``bottom`` is 0."""
    return top / bottom if bottom else 0.0


def f1_score(precision: float, recall: float) -> float:
    """Harmonic mean, 0 if both are 0."""
    return ratio(2 * precision * recall, precision + recall)


def retrieval(found: float, predicted: float, wanted: float) -> dict[str, float]:
    """``{precision, recall, f1}`` of ``found`` hits among ``predicted`` items, of ``wanted`` ones."""
    precision, recall = ratio(found, predicted), ratio(found, wanted)
    return {"precision": precision, "recall": recall, "f1": f1_score(precision, recall)}
