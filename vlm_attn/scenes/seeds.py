"""Which scene seeds may be used for what: training, calibration and evaluation never share a picture."""

from __future__ import annotations

CALIBRATION_SEEDS = range(1_000_000)
"""Scenes for tuning: noise levels, method calibration, checkpoints to keep."""
EVALUATION_SEEDS = range(1_000_000, 2_000_000)
"""Scenes for published figures only."""
TRAIN_SEEDS = range(10_000_000, 4_000_000_000)
"""Scenes the model learns from."""

SPLITS: dict[str, range] = {
    "train": TRAIN_SEEDS,
    "calibration": CALIBRATION_SEEDS,
    "evaluation": EVALUATION_SEEDS,
}


def split_seeds(split: str, start: int, count: int) -> range:
    """Return `count` consecutive seeds of a split, beginning `start` seeds into it.

    Raises:
        ValueError: the split is unknown, or the request would leave it and so touch another split's pictures.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    seeds = SPLITS[split]
    if start < 0 or count < 0 or start + count > len(seeds):
        raise ValueError(
            f"{count} seeds from {start} do not lie inside the {split} split, which holds {len(seeds)}; "
            "ask for fewer, or start earlier"
        )
    return seeds[start : start + count]


def require_split(split: str, seeds: range | list[int]) -> None:
    """Refuse seeds that do not belong to a split.

    Raises:
        ValueError: a seed lies outside the split's range.
    """
    allowed = SPLITS[split]
    for seed in seeds:
        if seed not in allowed:
            raise ValueError(f"seed {seed} is not a {split} seed ({allowed.start} to {allowed.stop - 1})")
