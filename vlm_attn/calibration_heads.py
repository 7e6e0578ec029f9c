"""Head searches: one attention head at a time is edited, and calibration questions say what that does.

A question has a right and a wrong answer. What is read is the model's next-token distribution after the prompt: the
margin (log-sum-exp of the logits of the right answer's first tokens, over its spellings with capital and leading
blank, minus that of the wrong answer), accuracy (share of positive margins) and entropy. The edits themselves come
through the registry by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from . import profiles
from .attention.call import Call
from .images import load_image
from .readouts.recorder import Recorder
from .registry import method
from .stages import Method
from .words import roles
from .wrap import VLM

By = Literal["accuracy", "entropy"]
Head = tuple[int, int]
QUESTIONS = "questions.jsonl"
UP, DOWN = (1.5, 2.0, 3.0, 4.0), (0.3, 0.5, 0.7, 0.85)
PROBE = 2.0
SHARE = {"head_gate": 0.05, "adhh": 0.02}
"""Share of all heads that is kept: about 5 % arbitrate (published); 20 of 1024 hallucinate (published list)."""


@dataclass(frozen=True)
class Question:
    """A picture, a question, its right answer and a competing one."""

    image: Image.Image
    text: str
    right: str
    wrong: str


def questions(vlm: VLM, n: int, folder: Path | None) -> list[Question]:
    """Calibration questions: of the bundled picture world, or of ``questions.jsonl`` in a folder of pictures.

    Raises:
        ValueError: no such file, or a line without ``image``, ``question``, ``answer`` and ``wrong``.
    """
    if folder is not None:
        return list(islice(_from_file(folder / QUESTIONS), n))
    if profiles.public_name(vlm._live().info.checkpoint) != "scenes":
        raise ValueError(
            f"a head search needs questions with answers: give --images FOLDER with a {QUESTIONS} in it, one "
            '{"image": file, "question": ..., "answer": ..., "wrong": ...} per line, of pictures in no evaluation set'
        )
    from .scenes import benchmarks

    rows = islice(benchmarks.pope("random", -(-n // 6), seeds="calibration"), n)
    other = {"yes": "no", "no": "yes"}
    return [
        Question(benchmarks.load_image(r), str(r["question"]), str(r["label"]), other[str(r["label"])]) for r in rows
    ]


def _from_file(path: Path) -> Iterator[Question]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a head search needs questions with answers, one object a line")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            picture = path.parent / Path(str(row["image"])).name  # a name cannot leave the folder
            texts = (str(row["question"]), str(row["answer"]), str(row["wrong"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: needs image, question, answer and wrong ({error!r})") from error
        yield Question(load_image(picture), *texts)


@dataclass(frozen=True)
class Reading:
    """fp32 ``[n]`` each: margin and entropy (nats) of every question."""

    margins: Tensor
    entropies: Tensor

    @property
    def accuracy(self) -> float:
        """Share of questions whose right answer leads."""
        return float((self.margins > 0).float().mean())

    @property
    def margin(self) -> float:
        """Mean margin."""
        return float(self.margins.mean())

    @property
    def entropy(self) -> float:
        """Mean entropy in nats."""
        return float(self.entropies.mean())


class Bench:
    """Questions turned into model inputs once, asked again and again with other methods."""

    def __init__(self, vlm: VLM, asked: Sequence[Question]):
        self.vlm = vlm
        self.inputs = [vlm.inputs([q.image], q.text) for q in asked]
        self.first = [(self._first(q.right), self._first(q.wrong)) for q in asked]
        for q, (right, wrong) in zip(asked, self.first, strict=True):
            if right & wrong:
                raise ValueError(f"answers '{q.right}' and '{q.wrong}' start with the same token: choose others")

    def _first(self, answer: str) -> set[int]:
        tokenizer = getattr(self.vlm.processor, "tokenizer", self.vlm.processor)
        bare = answer.strip()
        spelled = [word for case in (bare, bare.lower(), bare.capitalize()) for word in (case, f" {case}")]
        encoded = [tokenizer(word, add_special_tokens=False).input_ids for word in spelled]
        found = {int(next(i for i in ids if tokenizer.decode([i]).strip())) for ids in encoded}
        return found - {tokenizer.unk_token_id} or found

    def ask(self, edit: Method | None) -> Reading:
        """Asks every question with one method attached."""
        self.vlm.set_method(edit)
        margins, entropies = [], []
        with torch.no_grad():
            for inputs, (right, wrong) in zip(self.inputs, self.first, strict=True):
                logits = self.vlm.model(**inputs).logits[0, -1].float()
                margins.append(logits[sorted(right)].logsumexp(-1) - logits[sorted(wrong)].logsumexp(-1))
                log = logits.log_softmax(-1)
                entropies.append(-(log.exp() * log).sum())
        return Reading(torch.stack(margins), torch.stack(entropies))

    def heads(self, layers: Sequence[int]) -> list[Head]:
        """Every (layer, head) of some layers."""
        return [(layer, head) for layer in layers for head in range(self.vlm._live().info.heads)]


def search(vlm: VLM, name: str, asked: Sequence[Question], by: By = "accuracy") -> dict[str, Any]:
    """The record of one method: ``act``, ``zerotuning``, ``head_gate`` or ``adhh``; the pipeline is put back."""
    before = vlm.methods
    try:
        bench = Bench(vlm, asked)
        return {**_SEARCHES[name](bench, by), "questions": len(asked)}
    finally:
        vlm.set_method(list(before))


def _act(bench: Bench, by: By) -> dict[str, Any]:
    """Heads that raise accuracy when they alone are calibrated."""
    base = bench.ask(None).accuracy
    layers = range(2, bench.vlm._live().info.layers - 1)
    found = {head: bench.ask(method("act", heads=[head])).accuracy for head in bench.heads(layers)}
    kept = [list(head) for head, accuracy in found.items() if accuracy > base]
    if not kept:
        raise ValueError(f"no single head raises accuracy above {base:.3f} on these questions: use more of them (-n)")
    return {"heads": kept, "baseline_accuracy": round(base, 4), "best_single": round(max(found.values()), 4)}


def _zerotuning(bench: Bench, by: By) -> dict[str, Any]:
    """The dominant type of head (up- or down-effective at gamma 2), then gamma on a grid."""

    def value(reading: Reading) -> float:
        return reading.accuracy if by == "accuracy" else -reading.entropy

    base = bench.ask(None)
    layers = range(bench.vlm._live().info.layers)
    effect = {
        head: value(bench.ask(method("zerotuning", gamma=PROBE, heads=[head]))) - value(base)
        for head in bench.heads(layers)
    }
    up, down = ([h for h, e in effect.items() if sign * e > 0] for sign in (1, -1))
    if not up and not down:
        raise ValueError("no single head changes anything on these questions: use more of them (-n)")
    kept, grid = (up, UP) if len(up) >= len(down) else (down, DOWN)
    tried = {g: value(bench.ask(method("zerotuning", gamma=g, heads=kept))) for g in grid}
    best = max(tried, key=lambda g: tried[g])
    return {
        "gamma": best,
        "heads": [list(head) for head in kept],
        "type": "up" if kept is up else "down",
        "by": by,
        "baseline": round(value(base), 5),
        "tried": {str(g): round(v, 5) for g, v in tried.items()},
    }


def _ranked(name: str, edit: Callable[[Head], Method], sign: int) -> Callable[[Bench, By], dict[str, Any]]:
    """Heads whose edit moves the mean margin most in one direction, a fixed share of all heads."""

    def run(bench: Bench, by: By) -> dict[str, Any]:
        base = bench.ask(None).margin
        heads = bench.heads(range(bench.vlm._live().info.layers))
        score = {head: sign * (bench.ask(edit(head)).margin - base) for head in heads}
        count = max(1, round(SHARE[name] * len(heads)))
        kept = sorted((h for h in heads if score[h] > 0), key=lambda h: -score[h])[:count]
        if not kept:
            raise ValueError(f"no head of {name} moves the margin the right way on these questions: use more (-n)")
        return {"heads": [list(h) for h in kept], "scores": [round(score[h], 5) for h in kept]}

    return run


_SEARCHES: dict[str, Callable[[Bench, By], dict[str, Any]]] = {
    "act": _act,
    "zerotuning": _zerotuning,
    "head_gate": _ranked("head_gate", lambda h: method("head_gate", heads=[h], mode="block", drop="output"), -1),
    "adhh": _ranked("adhh", lambda h: method("adhh", heads=[h], threshold=0.0), 1),
}


class _Shift(Recorder):
    """Total positive change of visual attention from one question token to the next, per layer."""

    def __init__(self, layers: Sequence[int], vis: Tensor, words: Tensor):
        super().__init__(layers)
        self.vis, self.words, self.total = vis, words, dict.fromkeys(layers, 0.0)

    def take(self, layer: int, call: Call) -> None:
        """Called after each attention call."""
        now, before = (call.weights(rows)[0][..., self.vis] for rows in (self.words, self.words - 1))
        self.total[layer] += float((now - before).clamp(min=0).sum())


def gaze_layers(vlm: VLM, pairs: Sequence[tuple[Image.Image, str]]) -> dict[str, Any]:
    """The layer in which attention to the picture changes most while the question is read, summed over prompts.

    The edited layers are 12..22 of 32, by relative depth [unverified for other depths].
    """
    session = vlm._live()
    layers = [number for number, _ in session.family.attentions()]
    total = dict.fromkeys(layers, 0.0)
    for image, text in pairs:
        inputs = vlm.inputs([image], text)
        ids = inputs["input_ids"]
        first = Recorder([])
        with torch.no_grad(), session.suspended(), session.recording(first):
            vlm.model(**inputs)
        tokens = session.family.token_map(ids, inputs.get("attention_mask"), list(first.media.values()))
        found = roles(vlm.processor, ids, tokens, "gift")
        words = (found.content if bool(found.content.any()) else found.question)[0].nonzero()[:, 0]
        shift = _Shift(layers, tokens.vis[0].nonzero()[:, 0], words)
        with torch.no_grad(), session.suspended(), session.recording(shift):
            vlm.model(**inputs)
        for layer in layers:
            total[layer] += shift.total[layer]
    depth = session.info.layers
    edited = sorted({min(round(layer * depth / 32), depth - 1) for layer in range(12, 23)})
    return {
        "saliency_layer": max(total, key=lambda layer: total[layer]),
        "enhance_layers": edited,
        "shift": [round(total[layer] / len(pairs), 5) for layer in layers],
        "prompts": len(pairs),
    }
