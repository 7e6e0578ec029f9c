"""What was read while a model answered: one record per sample, with the published measures as its methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SEGMENTS = ("first", "system", "image", "between", "question", "generated")
"""Keys of a row: the first token, other text before the first image, visual tokens, text between images, text behind
the last image (turn markers included), and the answer so far."""
FIRST, SYSTEM, IMAGE, BETWEEN, QUESTION, GENERATED = range(6)
GROUPS = {"system": (FIRST, SYSTEM), "image": (IMAGE,), "text": (BETWEEN, QUESTION, GENERATED)}
WHAT = ("shares", "vas", "heads", "mdi", "aei", "sinks", "vhd", "t_vhd")
DEFAULT = ("shares", "vas", "heads", "mdi", "aei", "sinks")
FORMAT = 1

Rows = Literal["last", "question", "generated"]
"""Query rows: the last prompt row, which predicts the first token; the prompt's text behind the last image; the
generated tokens that were fed back."""


@dataclass(frozen=True)
class Sink:
    """A prompt token that draws attention whatever is asked.

    Attributes:
        position: in the prompt, padding not counted.
        kind: its segment. image: index of its image, -1 for text. cell: (row, column) on the visual grid, or None.
        layers: where it is a sink. share: mean share of a row's attention there. peak: largest share.
        primary: whether it is one in more than half of the layers.
    """

    position: int
    kind: str
    image: int
    cell: tuple[int, int] | None
    layers: tuple[int, ...]
    share: float
    peak: float
    primary: bool


@dataclass(frozen=True, eq=False)
class Record:
    """Attention of one sample, read row by row; ``T`` rows that predicted a token, ``L`` layers, ``H`` query heads.

    Weights are those the model used: softmax after all biases and maps of attached edits, then their changes of the
    weights. Rows of an edit that does not renormalise sum to less than 1. After pruning, a layer's numbers speak of
    the tokens that reached it. Head scales come behind the weights and show in later layers only.

    Attributes:
        what: the readouts that were asked for.
        layers: the decoder layers read (those with attention).
        tokens: ids of the answer.
        counts: int64 ``[L, 5]``, prompt keys per layer and segment (:data:`SEGMENTS`).
        shares: fp32 ``[T, L, H, 6]``, share of each segment in the row that predicted token t.
        concentration: fp32 ``[T, L, H]``, ``1 - H(A_vis / M_V) / log N_v`` of the same rows; NaN without visual mass.
        question: fp32 ``[L, H, 6]``, mean shares over the question's rows.
        question_vas: fp32 ``[L, H]``, mean over the question's rows of image over system share.
        kinds: int64 ``[N]``, segment of each prompt token. places: int64 ``[N, 3]``, its image, row and column, or -1.
        received: fp32 ``[L, N]``, weight on each prompt token, mean over heads and the other question rows that see
            it; NaN where it was pruned or fewer than half of these rows see it (``"sinks"``).
        vhd: fp32 ``[T, L, H]`` (``[1, L, H]`` without ``"t_vhd"``), see :meth:`t_vhd`.
        about: checkpoint, family and methods.
    """

    what: tuple[str, ...]
    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    counts: Tensor
    shares: Tensor
    concentration: Tensor
    question: Tensor
    question_vas: Tensor
    kinds: Tensor
    places: Tensor
    received: Tensor | None = None
    vhd: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------------- attention

    def segments(self, rows: Rows = "last") -> Tensor:
        """Mean share of every segment over some rows, fp32 ``[L, H, 6]``.

        Raises:
            ValueError: no such rows: a question behind the image, or two or more generated tokens, are needed.
        """
        if rows == "question":
            if bool(self.question.isnan().all()):
                raise ValueError("the prompt has no text behind its last image: read rows='last' instead")
            return self.question
        if rows == "last":
            return self.shares[0]
        if rows != "generated":
            raise ValueError(f"unknown rows '{rows}': choose 'last', 'question' or 'generated'")
        if len(self.shares) < 2:
            raise ValueError("no generated token was fed back: read with max_new_tokens of at least 2")
        return self.shares[1:].mean(0)

    def share(self, group: str, rows: Rows = "last") -> Tensor:
        """Share of a segment, or of ``"system"`` (first token included), ``"image"`` or ``"text"`` (all other text
        and the answer so far), fp32 ``[L, H]``."""
        if group not in GROUPS and group not in SEGMENTS:
            raise ValueError(f"unknown group '{group}': choose {', '.join((*GROUPS, *SEGMENTS))}")
        members = GROUPS.get(group) or (SEGMENTS.index(group),)
        return self.segments(rows)[..., list(members)].sum(-1)

    def vas(self, rows: Rows = "question") -> Tensor:
        """Visual attention score ``sum_vis A / sum_sys A``, fp32 ``[L, H]``, mean over rows; NaN without system text.

        The system part is all text before the first image, the first token included, so that this is mostly visual
        mass over sink mass. arXiv 2603.03825; which rows it averages over is [unverified].
        """
        if rows == "question":
            self.segments(rows)
            return self.question_vas
        steps = self.shares[:1] if rows == "last" else self.shares[1:]
        self.segments(rows)
        return ratio(steps[..., IMAGE], steps[..., [FIRST, SYSTEM]].sum(-1)).nanmean(0)

    def visual_heads(self, step: int = 0) -> dict[str, Tensor]:
        """``mass`` on visual tokens, ``concentration`` on few of them, and ``score = mass * concentration``, fp32
        ``[L, H]`` each, of the row that predicted token ``step``.

        arXiv 2412.18108 ranks heads by the mass of the first decoded row; concentration and score are
        [unverified] stand-ins for its second axis.
        """
        mass, concentration = self.shares[step, ..., IMAGE], self.concentration[step]
        return {"mass": mass, "concentration": concentration, "score": mass * concentration}

    def mdi(self, rows: Rows = "generated", *, first: bool = True) -> Tensor:
        """Modality dominance index ``(A_T / |T|) / (A_O / |O|)`` per layer, fp32 ``[L]``; above 1 text dominates.

        Head-mean rows; T all text of the prompt (without its first token where ``first=False`` [unverified which one
        the paper means]), O the visual tokens; attention to the answer does not count. NaN without visual tokens.
        arXiv 2508.10552. A diagnostic: fewer visual tokens move it towards 1 whatever the model sees.
        """
        text, image, texts, images = self._modalities(rows, first)
        return ratio(ratio(text, texts), ratio(image, images))

    def aei(self, rows: Rows = "generated", *, first: bool = True) -> tuple[Tensor, Tensor]:
        """Attention efficiency of text and image, ``P / Q`` with P the share of attention and Q the share of tokens,
        fp32 ``[L]`` each; see :meth:`mdi`."""
        text, image, texts, images = self._modalities(rows, first)
        both, all_tokens = text + image, texts + images
        return ratio(ratio(text, both), texts / all_tokens), ratio(ratio(image, both), images / all_tokens)

    def _modalities(self, rows: Rows, first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention on text and image, and their tokens, ``[L]`` each."""
        members = [SYSTEM, BETWEEN, QUESTION, *([FIRST] if first else [])]
        weights = self.segments(rows).mean(1)
        return (
            weights[:, members].sum(1),
            weights[:, IMAGE],
            self.counts[:, members].sum(1).float(),
            self.counts[:, IMAGE].float(),
        )

    # ------------------------------------------------------------------------------------- sinks and text streams

    def sinks(self, alpha: float = 5.0) -> list[Sink]:
        """Prompt tokens that receive more than ``alpha / N`` of a question row's attention, N tokens in the layer.

        The threshold is that of arXiv 2406.15765, here on head means and without what a token pays to itself [ours];
        tokens that fewer than half of the question's rows see are not judged. Primary sinks are those of more than
        half of the layers, secondary ones come and go [ours]. Primary first, then by share and layers.
        """
        received = self._recorded(self.received, "sinks")
        limit = alpha / self.counts.sum(1, keepdim=True).clamp(min=1)
        flagged = received > limit  # false where NaN
        out = []
        for position in flagged.any(0).nonzero()[:, 0].tolist():
            here = flagged[:, position]
            image, row, column = self.places[position].tolist()
            values = received[here, position]
            out.append(
                Sink(
                    position=position,
                    kind=SEGMENTS[int(self.kinds[position])],
                    image=image,
                    cell=None if row < 0 else (row, column),
                    layers=tuple(self.layers[i] for i in here.nonzero()[:, 0].tolist()),
                    share=float(values.mean()),
                    peak=float(values.max()),
                    primary=int(here.sum()) * 2 > len(self.layers),
                )
            )
        return sorted(out, key=lambda sink: (-sink.primary, -sink.share * len(sink.layers)))

    def vision_aware(self) -> Tensor:
        """Vision-aware head divergence ``||O_img - O_txt||_2`` of the last prompt row, fp32 ``[L, H]``.

        O_img: head outputs before ``o_proj`` and before this layer's head scales, all edits active; O_txt: those of
        the prompt without its images, unedited. No outlier is removed. arXiv 2412.13949.
        """
        return self._recorded(self.vhd, "vhd")[0]

    def t_vhd(self, top: int | None = None) -> Tensor:
        """Token-level divergence ``sum_l sum_{top heads} VHD``, fp32 ``[T]``, one number per token of the answer.

        The text-only stream reads the answer as well. ``top``: heads per layer, by default half of them [unverified:
        the paper's number is not known].
        """
        vhd = self._recorded(self.vhd if "t_vhd" in self.what else None, "t_vhd")
        count = max(1, vhd.shape[-1] // 2) if top is None else top
        if not 1 <= count <= vhd.shape[-1]:
            raise ValueError(f"top={top}: choose 1..{vhd.shape[-1]} heads per layer")
        return vhd.topk(count).values.sum((1, 2))

    @staticmethod
    def _recorded(value: Tensor | None, name: str) -> Tensor:
        if value is None:
            raise ValueError(f"'{name}' was not read: ask for it with what=[..., '{name}']")
        return value

    # --------------------------------------------------------------------------------------------------- as data

    def summary(self) -> dict[str, Any]:
        """What was asked for in plain numbers (None = not defined for this sample), per layer or as means."""
        rows: Rows = "generated" if len(self.shares) > 1 else "last"
        made: dict[str, Any] = {}
        for name in self.what:
            if name == "shares":
                made[name] = {group: plain(self.share(group, rows).mean(1)) for group in GROUPS}
            elif name == "vas":
                asked: Rows = rows if bool(self.question.isnan().all()) else "question"
                made[name] = {"mean": plain(self.vas(asked).nanmean()), "rows": asked}
            elif name == "heads":
                made[name] = self._ranking()
            elif name == "mdi":
                made[name] = {
                    label: _stages(self.mdi(rows, first=first))
                    for label, first in (("all text", True), ("without first token", False))
                }
            elif name == "aei":
                text, image = self.aei(rows)
                made[name] = {"text": _stages(text), "image": _stages(image)}
            elif name == "sinks":
                made[name] = [asdict(sink) for sink in self.sinks()]
            elif name == "vhd":
                made[name] = {"mean": plain(self.vision_aware().mean(1))}
            elif name == "t_vhd":
                made[name] = plain(self.t_vhd())
        return {"rows": rows, **made}

    def _ranking(self, count: int = 10) -> list[dict[str, Any]]:
        """The heads with the largest visual score."""
        found = self.visual_heads()
        score = found["score"].nan_to_num(0.0)
        best = score.flatten().topk(min(count, score.numel())).indices.tolist()
        pairs = [(i // score.shape[1], i % score.shape[1]) for i in best]
        return [
            {"layer": self.layers[n], "head": h, **{name: plain(found[name][n, h]) for name in found}}
            for n, h in pairs
        ]

    def save(self, path: str | Path) -> Path:
        """Writes ``PATH.json`` (facts and summary) and ``PATH.safetensors`` (every tensor); returns the first."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name in _TENSORS if (value := getattr(self, name)) is not None}
        save_file(tensors, _beside(path, ".safetensors"))
        head = {"format": FORMAT, "about": dict(self.about), "what": self.what, "layers": self.layers}
        head |= {"tokens": self.tokens, "segments": SEGMENTS, "summary": self.summary()}
        target = _beside(path, ".json")
        target.write_text(json.dumps(head, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: not a record, or one of a newer version.
        """
        source = _beside(Path(path), ".json")
        try:
            head = json.loads(source.read_text(encoding="utf-8"))
            if head["format"] > FORMAT:
                raise ValueError(f"{source} was written by a newer vlm-attn: upgrade to read it")
            tensors = load_file(_beside(Path(path), ".safetensors"))
            return cls(
                what=tuple(head["what"]),
                layers=tuple(head["layers"]),
                tokens=tuple(head["tokens"]),
                about=head["about"],
                **tensors,
            )
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} is no record of vlm-attn read ({error!r})") from error


_TENSORS = ("counts", "shares", "concentration", "question", "question_vas", "kinds", "places", "received", "vhd")


def checked(what: Sequence[str] | str) -> tuple[str, ...]:
    """The readouts asked for, each once, in the order of :data:`WHAT`.

    Raises:
        ValueError: none, or one that does not exist.
    """
    names = [what] if isinstance(what, str) else list(what)
    unknown = [name for name in names if name not in WHAT]
    if unknown or not names:
        raise ValueError(
            f"no such readout: {', '.join(map(repr, unknown)) or 'none given'} (there are {', '.join(WHAT)})"
        )
    return tuple(name for name in WHAT if name in names)


def ratio(over: Tensor, under: Tensor) -> Tensor:
    """``over / under``, NaN where ``under`` is 0."""
    return torch.where(under > 0, over / under.clamp(min=torch.finfo(torch.float32).tiny), float("nan"))


def plain(x: Tensor) -> Any:
    """A tensor as numbers of five digits, None for NaN."""
    if x.dim():
        return [plain(part) for part in x]
    return None if not bool(x.isfinite()) else float(f"{float(x):.5g}")


def _stages(x: Tensor) -> dict[str, Any]:
    """Means over the first two, the middle two and the last two layers, and every layer."""
    middle = max(len(x) // 2 - 1, 0)
    parts = {"early": x[:2], "middle": x[middle : middle + 2], "late": x[-2:]}
    return {**{name: plain(part.mean()) for name, part in parts.items()}, "layers": plain(x)}


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name.removesuffix(".json").removesuffix(".safetensors") + suffix)
