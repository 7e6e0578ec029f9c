"""PAI of the package `mitigv` in the rounds of `vlm-attn bench edits`, on the same random-weight model.

    pip install --no-deps --target peers mitigv
    PYTHONPATH=peers python benchmarks/peers.py            # the whole table with one row more
    PYTHONPATH=peers python benchmarks/peers.py --method pai --rounds 3 --clock cpu

It runs as its authors wrote it: its own decoding loop, the model in eager mode (its attention adds a mask that sdpa
does not build), the logit part alone (gamma 1) with strength and layers of `pai`. Timed are its calls of the model;
they compute all logits of the prompt, where ours ask for the last row.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vlm_attn import bench


class Prepared:
    """A processor that hands over a finished prompt, whatever it is asked."""

    tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=0, batch_decode=lambda ids, **_: [""] * len(ids))

    def __init__(self, job: bench.Request):
        self.job = job

    def __call__(self, **_: Any) -> dict[str, torch.Tensor]:
        ids = self.job.ids
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.job.pixels}


def mitigv_pai(trial: bench.Trial) -> bench.Taken:
    """One answer of ``trial.steps + 1`` tokens."""
    from mitigv.algorithms.pai import PAI

    model, beside = trial.model, trial.beside
    started: list[float] = []
    seconds: list[float] = []
    stock: list[float] = []

    def ended(*_: Any) -> None:
        seconds.append(trial.clock() - started[-1])
        if beside is not None:
            stock.append(beside())

    hooks = [
        model.register_forward_pre_hook(lambda *_: started.append(trial.clock())),
        model.register_forward_hook(ended),
    ]
    if beside is not None:
        beside.restart()
    model.set_attn_implementation("eager")
    layers = model.config.text_config.num_hidden_layers
    try:
        # The class on the bare model: the adapter that its `mitigate` puts around it hides the decoder layers of
        # transformers 5.23 from it.
        pai = PAI(
            model=model, processor=Prepared(trial.job), alpha=0.2, gamma=1.0, start_layer=2, end_layer=layers,
            max_new_tokens=trial.steps + 1, do_sample=False,
        )  # fmt: skip
        with trial.in_turn():
            pai(None, "<image>")
    finally:
        model.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
    decode = statistics.median(seconds[1:])
    return bench.Taken(
        seconds[0], decode, statistics.median(stock or [decode]), facts={"calls": len(seconds)},
        stock_prefill=beside.prefill if beside is not None else math.nan,
    )  # fmt: skip


def main() -> int:
    """Runs the table with the peer in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", default=[], choices=["deep", "long"])
    parser.add_argument("--method", action="append", default=[], help="these methods alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--output", type=Path, help="JSON file to write as well")
    options = parser.parse_args()
    try:
        from importlib.metadata import version

        said = f"mitigv {version('mitigv')}, eager, logit part"
    except ImportError:
        parser.error("mitigv is not importable: see the first lines of this file")
    peer = bench.Case("mitigv pai", mitigv_pai, ours=False, said=said)
    report = bench.run_edits(
        options.shape, rounds=options.rounds, clock=options.clock, peers=[peer], only=options.method
    )  # fmt: skip
    bench.print_report(report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["valid"] else 1


if __name__ == "__main__":
    sys.exit(main())
