"""Calibration: measures what methods need to know about a checkpoint and saves it where ``wrap`` finds it.

Only calibration pictures are used: for the bundled model the calibration seeds of the picture world, for other
checkpoints a folder of pictures that the caller keeps apart from every evaluation set.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import optimize
from torch import Tensor

from . import profiles, pruning, registry, selection
from .calibration_heads import By, gaze_layers, questions, search
from .images import load_image
from .profiles import Profile
from .readouts.recorder import Recorder
from .recipe import pipeline
from .registry import closest
from .stages import Prune, PruneView, Site, field_names, method_dataclass
from .tokens import TokenMap
from .wrap import VLM

Pair = tuple[Image.Image, str]
PROMPTS = (
    "Please describe this image in detail.",
    "What is the main object in the image?",
    "Is there a person in the image?",
    "What colors are in the image?",
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
BINS, GRID_BINS = 64, 16


def calibrate(
    vlm: VLM,
    what: Sequence[str] = (),
    *,
    n: int | None = None,
    out: Path | None = None,
    images: Path | None = None,
    layer: int = 1,
    weak_sinks: bool = False,
    by: By = "accuracy",
) -> dict[str, Any]:
    """Measures the per-checkpoint data of methods and writes the profile.

    Args:
        vlm: the wrapped checkpoint; its pipeline is suspended meanwhile.
        what: method names (``"var"``: sink dimensions; ``"fastv"`` and every other pruning method that can be
            debiased, or a YAML file with one and its parameters: trend of its first score; ``"gift"``: layer of the
            map; ``"act"``, ``"zerotuning"``, ``"head_gate"``, ``"adhh"``: head searches, which ask every
            question once per head); empty = the first two.
        n: pictures to use (sinks: 32, trend: 256, gaze: 16, head searches: 96 questions by default).
        out: profile file; by default the one ``wrap`` looks for.
        images: folder of pictures; not needed for the bundled model.
        layer: decoder layer whose attention FastV's trend is fitted on (its K - 1).
        weak_sinks: where no sink dimension qualifies, record the strongest two and say so, instead of raising.
        by: what ``"zerotuning"`` profiles heads by: accuracy, or the entropy of the answer's distribution.

    Returns:
        ``{"profile": path, "entries": measured records}``.

    Raises:
        ValueError: unknown method, no pictures, or a checkpoint without the property that a method needs.
    """

    def heads(name: str) -> tuple[str, dict[str, Any]]:
        return name, search(vlm, name, questions(vlm, n or 96, images), by)

    def ranked(name: str) -> tuple[str, dict[str, Any]]:
        given = registry.method("fastv", layer=layer + 1) if name == "fastv" else pipeline(name)[0]
        record = trend(vlm, _pairs(vlm, n or 256, images), given)
        return f"trend:{record['score']}", record

    known: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
        "var": lambda: ("sinks", sinks(vlm, _pairs(vlm, n or 32, images), weak_sinks)),
        **{name: functools.partial(ranked, name) for name in _trended(what)},
        "gift": lambda: ("gift", gaze_layers(vlm, _pairs(vlm, n or 16, images))),
        **{name: functools.partial(heads, name) for name in ("act", "zerotuning", "head_gate", "adhh")},
    }
    for name in what:
        if name not in known:
            raise ValueError(
                f"'{name}' needs no calibration{closest(name, tuple(known))} (calibrated: {', '.join(known)})"
            )
    session = vlm._live()
    measured = dict(known[name]() for name in (what or ("var", "fastv")))
    checkpoint = session.info.checkpoint
    path = out or profiles.user_file(checkpoint or "unnamed")
    name = profiles.public_name(checkpoint)
    name = Path(name).name if Path(name).is_dir() else name
    old = Profile.load(path, session.info.signature).entries if path.is_file() else {}
    Profile(name, session.info.signature, {**old, **measured}).save(path)
    return {"profile": str(path), "entries": measured}


def _trended(what: Sequence[str]) -> list[str]:
    """Pruning methods whose score may have a trend, and the files among what was asked for."""
    names = [row.name for row in registry.methods() if row.stage == "prune" and "sigma" in field_names(row.cls)]
    return [*names, *(name for name in what if Path(name).suffix in (".yaml", ".yml"))]


def _pairs(vlm: VLM, n: int, images: Path | None) -> list[Pair]:
    if images is not None:
        files = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES) if images.is_dir() else []
        if not files:
            raise ValueError(f"{images} holds no pictures ({', '.join(SUFFIXES)})")
        return [(load_image(p), text) for p, text in zip(files[:n], cycle(PROMPTS), strict=False)]
    if profiles.public_name(vlm._live().info.checkpoint) != "scenes":
        raise ValueError(
            "calibration of this checkpoint needs pictures: give --images FOLDER, with pictures that are in no "
            "evaluation set"
        )
    from .scenes import benchmarks

    rows = benchmarks.pope("random", -(-n // 6), seeds="calibration")
    return [(benchmarks.load_image(row), str(row["question"])) for row in islice(rows, n)]


@contextlib.contextmanager
def _layer_inputs(layers: Iterable[Any], keep: dict[int, Tensor]) -> Iterator[None]:
    """Inside, ``keep[l]`` receives the input of decoder layer l of each forward (fp32 ``[N, D]``, first sample)."""
    handles = []
    try:
        for number, module in enumerate(layers):

            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
                keep[number] = (args[0] if args else kwargs["hidden_states"])[0].float()

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(vlm: VLM, pair: Pair, layers: Sequence[int], text_rows: bool) -> tuple[TokenMap, Recorder]:
    """One prompt through the bare model; attention of the last row, or of all text rows that see the picture."""
    session = vlm._live()
    inputs = vlm.inputs([pair[0]], pair[1])
    ids = inputs["input_ids"]
    after = ids[0] != session.family.placeholders["image"]
    first = int((~after).nonzero()[0, 0]) if bool((~after).any()) else ids.shape[1]
    after[:first] = False
    recorder = Recorder(layers, rows=after.nonzero()[:, 0] if text_rows else None)
    with torch.no_grad(), session.suspended(), session.recording(recorder):
        vlm.model(**inputs)
    return session.family.token_map(ids, inputs.get("attention_mask"), list(recorder.media.values())), recorder


def sinks(vlm: VLM, pairs: Sequence[Pair], weak: bool = False) -> dict[str, Any]:
    """Sink dimensions of the residual stream.

    In the middle half of the layers, ``|x_d| / rms(x)`` is read at the first token and at the 1 % of visual tokens
    that receive most attention from text. A dimension is a candidate if its median over prompts exceeds
    ``0.3 sqrt(D)`` in at least a quarter of those layers; the strongest three are kept. ``tau`` is 20 for D = 4096
    and ``0.3125 sqrt(D)`` otherwise [unverified for other widths].

    With ``weak``, a checkpoint without such dimensions gets its two strongest ones and the tau that 5 % of its visual
    tokens exceed; the record then says ``"weak": true`` [ours: a stand-in, not the published definition].

    Raises:
        ValueError: no dimension qualifies, so redistribution from sinks is not defined for this checkpoint.
    """
    session = vlm._live()
    info = session.info
    middle = list(range(info.layers // 4, info.layers - info.layers // 4))
    keep: dict[int, Tensor] = {}
    seen: list[Tensor] = []
    states: list[tuple[TokenMap, dict[int, Tensor]]] = []
    with _layer_inputs(session.family.layers, keep):
        for pair in pairs:
            tokens, recorder = _read(vlm, pair, middle, text_rows=True)
            first = int(tokens.first[0].nonzero()[0, 0])
            slots = tokens.vis[0].nonzero()[:, 0]
            received = recorder.on(slots)[0]
            top = max(1, round(0.01 * slots.numel()))
            values = []
            for order, number in enumerate(middle):
                x = _relative(keep[number])
                visual = x[slots[received[order].topk(top).indices]].mean(0)
                values.append(torch.stack([x[first], visual]))
            seen.append(torch.stack(values))
            states.append((tokens, {number: keep[number] for number in middle}))
    medians = torch.stack(seen).median(0).values.amax(1)  # [layers, D], the stronger of the two places
    threshold = 0.3 * info.hidden**0.5
    share = (medians > threshold).float().mean(0)
    strength = medians.median(0).values
    found = [int(d) for d in strength.argsort(descending=True) if share[d] >= 0.25][:3]
    tau = 20.0 if info.hidden == 4096 else round(0.3125 * info.hidden**0.5, 4)
    best = strength.topk(2)
    if not found and not weak:
        raise ValueError(
            f"no sink dimension: the strongest are {best.indices.tolist()} at |x|/rms "
            f"{[round(v, 1) for v in best.values.tolist()]}, below 0.3 sqrt(D) = {threshold:.1f}. Redistribution from "
            "sinks is not defined for this checkpoint; to try anyway use --weak-sinks, or give var sink_dims and tau"
        )
    dims = found or [int(d) for d in best.indices]
    phi = torch.cat([_relative(x)[t.vis[0]][:, dims].amax(-1) for t, layers in states for x in layers.values()])
    if not found:
        tau = round(float(phi.quantile(0.95)), 4)
    return {
        "dims": dims,
        "tau": tau,
        "weak": not found,
        "strength": [round(float(strength[d]), 3) for d in dims],
        "flagged_visual_share": round(float((phi > tau).float().mean()), 5),
        "prompts": len(pairs),
    }


def _relative(x: Tensor) -> Tensor:
    """``|x| / rms(x)`` per token."""
    return x.abs() / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


RANKING = "ranking"


@method_dataclass
class Ranking(Prune):
    """Ranks the visual tokens as another pruning method does where it first cuts by attention, and drops none."""

    name = "ranking"
    summary = "read the score of a pruning method"

    of: Any

    def sites(self) -> tuple[Site, ...]:
        last = self.of.scored().layer
        return tuple(site for site in self.of.sites() if site.score is not None and site.layer <= last)

    def rows(self, name: str, tokens: TokenMap, embeds: Tensor) -> Tensor:
        return self.of.rows(name, tokens, embeds)

    def keep_mask(self, view: PruneView) -> Tensor:
        view.memory[RANKING] = self.of.ranking(view)
        return view.tokens.vis


def trend(vlm: VLM, pairs: Sequence[Pair], method: Any) -> dict[str, Any]:
    """Positional trend ``mu exp(sigma x)`` of the score by which a pruning method first cuts, nothing being cut.

    Scores are divided by their mean per picture (unpublished choice, so that no picture dominates), averaged in 64
    bins of x over tokens that show picture, and fitted by least squares, started from the log-linear fit. The
    self-check fits the debiased scores in the same way: methods warn of a record whose ``sigma_after`` lies beyond
    +-0.1. Where the tokens form a grid, ``grid_sigma`` holds the exponents of rows and of columns, fitted together in
    16 x 16 bins. Where all pictures have the same number of visual tokens, ``mean`` holds the average place by place
    (0 where no picture shows anything).
    """
    session = vlm._live()
    # Stand-ins, so that the method does not ask for what is measured here.
    method = method.with_values(sigma=0.0, grid_sigma=(0.0, 0.0), mean=(1.0,)).resolve(session.info, session.profile)
    before = list(session.methods)
    vlm.set_method(Ranking(of=method))
    try:
        return {"score": method.trend_id, **_fitted(vlm, pairs)}
    finally:
        vlm.set_method(before)


def _fitted(vlm: VLM, pairs: Sequence[Pair]) -> dict[str, Any]:
    session = vlm._live()
    xs, values, cells = [], [], []
    places: list[tuple[int, Tensor, Tensor]] = []
    for picture, text in pairs:
        with torch.no_grad():
            vlm.model(**vlm.inputs([picture], text))
        tokens, scores = session.last.tokens, session.last.notes[RANKING]
        visible = pruning.visible(tokens, session.family, vlm.processor, [[picture.size]])
        for row, all_slots, _ in selection.images(tokens):
            slots = all_slots[visible[row, all_slots]]
            found = scores[row, slots]
            xs.append(selection.position(tokens, row, slots))
            if tokens.layouts[row][0].views:
                cells.append(selection.place(tokens, row, slots))
            values.append(found / found.mean().clamp(min=1e-12))
            places.append((len(tokens.layouts[row][0]), tokens.order[row, slots], values[-1]))
    x, y = torch.cat(xs).double().cpu().numpy()[:, None], torch.cat(values).double().cpu().numpy()
    centres, means = _binned(x, y, BINS)
    mu, sigma, slope = _exponential(centres, means)
    residual = means - mu * np.exp(centres @ sigma)
    after = _exponential(*_binned(x, y * np.exp(-(x @ sigma)), BINS))[1]
    return {
        "sigma": round(float(sigma[0]), 5),
        "sigma_loglinear": round(float(slope[0]), 5),
        "mu": round(mu, 5),
        "r2": round(float(1 - residual.var() / max(means.var(), 1e-12)), 4),
        "sigma_after": round(float(after[0]), 5),
        "tokens": int(tokens.vis[0].sum()),
        "pictures": len(pairs),
        **(_grid(torch.cat(cells).double().cpu().numpy(), y) if len(cells) == len(xs) else {}),
        **_mean_map(places),
    }


def _grid(cells: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Exponents of rows and columns of scores at places ``[n, 2]``, and what the same fit finds after debiasing."""
    sigma = _exponential(*_binned(cells, y, GRID_BINS))[1]
    after = _exponential(*_binned(cells, y * np.exp(-(cells @ sigma)), GRID_BINS))[1]
    return {"grid_sigma": sigma.round(5).tolist(), "grid_sigma_after": after.round(5).tolist()}


def _exponential(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """mu, sigma ``[k]`` of the least-squares fit ``y = mu exp(x sigma)`` to ``x [n, k]``; sigma of the log-linear."""
    design = np.column_stack([np.ones(len(x)), x])
    level, *slopes = np.linalg.lstsq(design, np.log(np.maximum(y, 1e-12)))[0]
    (mu, *sigma), _ = optimize.curve_fit(
        lambda t, a, *b: a * np.exp(t @ np.array(b)), x, y, p0=(np.exp(level), *slopes), maxfev=10_000
    )
    return float(mu), np.array(sigma), np.array(slopes)


def _mean_map(places: Sequence[tuple[int, Tensor, Tensor]]) -> dict[str, Any]:
    """Mean of (tokens of the picture, places, scores) at each place; nothing where pictures differ in size."""
    sizes = {total for total, _, _ in places}
    if len(sizes) != 1:
        return {}
    total = torch.zeros(sizes.pop())
    seen = torch.zeros_like(total)
    for _, order, score in places:
        total.index_add_(0, order.cpu(), score.float().cpu())
        seen.index_add_(0, order.cpu(), torch.ones(order.numel()))
    return {"mean": [round(float(value), 6) for value in total / seen.clamp(min=1)]}


def _binned(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean position ``[m, k]`` and mean value ``[m]`` of the bins, ``bins`` per axis of ``x [n, k]``, with values."""
    axes = np.minimum((x * bins).astype(int), bins - 1)
    _, mine, counts = np.unique(axes, axis=0, return_inverse=True, return_counts=True)
    *centres, means = (np.bincount(mine.ravel(), weights=column) / counts for column in (*x.T, y))
    return np.column_stack(centres), means
