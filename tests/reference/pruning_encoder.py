"""Pruning by the vision encoder spelled out for CLIP towers: class-token attention, keys, features, projector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference import kit as loops
from tests.reference import kit_select as literal
from tests.reference.kit import Vector
from tests.reference.pruning import budget
from tests.reference.pruning_stages import Staged, whole_share


@dataclass
class Seen:
    """One picture: per-head class-token attention `[H][N]`, the same with one wide head, keys, features."""

    attention: list[Vector]
    wide: Vector
    keys: Tensor
    features: Tensor


def look(tower: nn.Module, pixels: Tensor, layer: int) -> list[Seen]:
    """Reads one layer of a CLIP tower from its hidden states."""
    states = tower(pixels, output_hidden_states=True).hidden_states
    blocks = tower.encoder.layers
    number = range(len(blocks))[layer]
    block = blocks[number]
    heads = block.self_attn.num_heads
    out = []
    for picture in range(len(pixels)):
        x = block.layer_norm1(states[number][picture])
        q, k = block.self_attn.q_proj(x), block.self_attn.k_proj(x)
        width = q.shape[-1] // heads
        split_q, split_k = (t.view(len(x), heads, width).transpose(0, 1) for t in (q, k))
        out.append(
            Seen(
                loops.cls_attention(split_q[:, 0], split_k, width**-0.5),
                loops.cls_attention(q[None, 0], k[None], (width * heads) ** -0.5)[0],
                split_k[:, 1:],
                states[-2][picture, 1:],
            )
        )
    return out


class ByEncoder(Staged):
    """One cut before the language model; `choose` decides on one picture."""

    layer = -2

    def __init__(self, model: Any, positions: str = "renumber", **params: Any) -> None:
        super().__init__(model, [0])
        self.renumber = positions == "renumber"
        self.params = params
        self.tower = model.base_model.vision_tower
        self.projector = model.base_model.multi_modal_projector

    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        with torch.no_grad():
            self.seen = look(self.tower, self.pixels, self.layer)
        return super().run(ids, features, forced)

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        out = []
        for image, seen in zip(self.alive, self.seen, strict=True):
            kept, replaced = self.choose(seen, x[image])
            for i, row in replaced.items():
                x[image[i]] = self.projector(torch.as_tensor(row, dtype=torch.float32)[None])[0]
            out.append(image[sorted(kept)])
        return out

    def choose(self, seen: Seen, z: Tensor) -> tuple[list[int], dict[int, Any]]:
        """Indices to keep, and encoder features to project in place of some of them."""
        raise NotImplementedError

    def mean_attention(self, seen: Seen) -> Vector:
        """Mean over heads."""
        return [loops.mean([head[i] for head in seen.attention]) for i in range(len(seen.wide))]


class FasterVLM(ByEncoder):
    """The most attended patches."""

    def choose(self, seen: Seen, z: Tensor) -> tuple[list[int], dict[int, Any]]:
        """See `ByEncoder.choose`."""
        attention = self.mean_attention(seen)
        return loops.top(attention, budget(self.params.get("keep", 0.2223), len(z), attention)), {}


class Compress(ByEncoder):
    """The share that is not reduced away."""

    def __init__(self, model: Any, encoder: str = "penultimate", **params: Any) -> None:
        super().__init__(model, **params)
        self.layer = -2 if encoder == "penultimate" else -1

    def choose(self, seen: Seen, z: Tensor) -> tuple[list[int], dict[int, Any]]:
        """See `ByEncoder.choose`."""
        count = whole_share(len(z), 1 - self.params.get("reduction", 0.75) + 1e-12)
        return loops.top(self.mean_attention(seen), count), {}


class VisPruner(ByEncoder):
    """Half by attention, half by even-odd deduplication."""

    def choose(self, seen: Seen, z: Tensor) -> tuple[list[int], dict[int, Any]]:
        """See `ByEncoder.choose`."""
        total = budget(self.params.get("keep", 0.2223), len(z))
        a = self.mean_attention(seen)
        first = loops.top(a, int(total * self.params.get("important", 0.5)))
        rest = [i for i in range(len(z)) if i not in first]
        others = literal.even_odd(seen.features[rest], [a[i] for i in rest], total - len(first))
        return first + [rest[i] for i in others], {}


class VisionZip(ByEncoder):
    """Dominant patches and contextual sums."""

    def choose(self, seen: Seen, z: Tensor) -> tuple[list[int], dict[int, Any]]:
        """See `ByEncoder.choose`."""
        n = len(z)
        total = budget(self.params.get("keep", 0.1112), n)
        given = self.params.get("contextual")
        count = round(total * 10 / 64) if given is None else budget(given, n)
        count = min(count, total - 1) if total < n else 0
        dominant = loops.top([sum(head[i] for head in seen.attention) for i in range(n)], total - count)
        if not count:
            return dominant, {}
        rest = [i for i in range(n) if i not in dominant]
        targets = list(range(0, len(rest), max(1, len(rest) // count)))[:count]
        parent = literal.nearest(seen.keys.mean(0)[rest], targets)
        fold = literal.averaged if self.params.get("true_mean") else literal.survivor_plus_mean
        merged = fold(seen.features[rest], parent)
        return dominant + [rest[t] for t in targets], {rest[t]: merged[t] for t in targets}


class PruMerge(ByEncoder):
    """Outliers, neighbours, one rest token."""

    layer = -1

    def choose(self, seen: Seen, z: Tensor) -> tuple[list[int], dict[int, Any]]:
        """See `ByEncoder.choose`."""
        n, a = len(z), seen.wide
        kept = set(literal.outliers(a))
        if self.params.get("plus"):
            kept |= set(range(0, n, max(1, int(n / len(kept) / 3))))
        kept |= set(loops.top(a, budget(self.params.get("at_least", 1), n)))
        pruned = [i for i in range(n) if i not in kept]
        if not pruned:
            return sorted(kept), {}
        keys = seen.keys.transpose(0, 1).reshape(n, -1)
        order = sorted(kept)
        changed = dict(zip(order, literal.knn_add(seen.features, keys, a, order, 32), strict=True))
        rows = loops.rows_of(seen.features)
        changed[pruned[-1]] = [sum(a[j] * rows[j][c] for j in pruned) for c in range(len(rows[0]))]
        return [*order, pruned[-1]], changed


class HoloV(ByEncoder):
    """Run-wise budgets."""

    def choose(self, seen: Seen, z: Tensor) -> tuple[list[int], dict[int, Any]]:
        """See `ByEncoder.choose`."""
        n = len(z)
        count = min(self.params.get("runs", 16), n)
        intended = self.params.get("version") == "intended"
        a = self.mean_attention(seen)
        t = loops.holistic(a, z, literal.bounds(n, count), intended)
        # As released the weights are those of the mean attention (the variance cancels): said so here.
        weights = t if intended else a
        return literal.runs(t if intended else a, weights, budget(self.params.get("keep", 0.2223), n), count), {}


def truncated(weight: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, where two factors hold fewer numbers than the weight."""
    if rank * (len(weight) + len(weight[0])) >= weight.numel():
        return weight
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return sum(s[j] * torch.outer(u[:, j], v[j]) for j in range(rank))


class Zoo(ByEncoder):
    """Sensitivity by differences of the projector itself, in double precision."""

    def choose(self, seen: Seen, z: Tensor) -> tuple[list[int], dict[int, Any]]:
        """See `ByEncoder.choose`."""
        score, m = self.params.get("score", "zo"), self.params.get("m", 64)
        generator = torch.Generator().manual_seed(self.params.get("seed", 0))
        bank = torch.randn(m, seen.features.shape[1], generator=generator)
        bank = (bank / bank.norm(dim=1, keepdim=True)).double()
        first, second = self.projector.linear_1, self.projector.linear_2
        w1, b1, w2 = (t.double() for t in (first.weight, first.bias, second.weight))
        act = self.projector.act
        if rank := self.params.get("rank"):
            w1, w2 = (truncated(w, rank) for w in (w1, w2))

        def project(x: Tensor) -> Tensor:
            return act(x @ w1.T + b1) @ w2.T  # the last bias cancels in differences

        x = seen.features.double()
        h = {"zo": self.params.get("h", 0.01), "jvp": 1e-6}.get(score, 0.0)
        if score == "norm":
            s = [loops.length(row) for row in loops.rows_of(z)]
        else:
            s = [
                loops.mean(((project(row + h * bank) - project(row - h * bank)).norm(dim=1) / (2 * h)).tolist())
                for row in x
            ]
        return literal.maxmin(z, whole_share(len(z), self.params.get("keep", 0.1112)), loops.minmax(s)), {}


class ApET(ByEncoder):
    """Errors of approximation from a sampled basis."""

    def choose(self, seen: Seen, z: Tensor) -> tuple[list[int], dict[int, Any]]:
        """See `ByEncoder.choose`."""
        n, x = len(z), seen.features
        total = budget(self.params.get("keep", 0.1112), n)
        generator = torch.Generator().manual_seed(self.params.get("seed", 0))
        start = int(torch.randint(n, (1,), generator=generator))
        basis = literal.farthest(x, min(self.params.get("basis", 10), total), start)
        errors = loops.approx_error(x, basis)
        rest = [i for i in loops.ranked(errors) if i not in basis]
        kept = sorted(basis + rest[: total - len(basis)])
        return kept, literal.averaged(x, literal.nearest(x, kept))
