"""Pruning in several stages spelled out: dropped tokens stay in the sequence, hidden; renumbering moves positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.reference import kit as loops
from tests.reference.llava import Dense, rotate, visual_runs
from tests.reference.pruning import budget


class Staged(Dense):
    """Cuts at given layers; `decide` says what each image keeps. `kept[layer]` holds surviving positions."""

    renumber = False

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        super().__init__(model)
        self.layers = tuple(layers)
        self.kept: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.margin = math.inf

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """Positions that each image keeps; may rewrite rows of `x` in place."""
        raise NotImplementedError

    # -- the decoder with cuts ---------------------------------------------------------------------------------------
    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """See `Dense.run`."""
        self.gone = torch.zeros(len(ids), dtype=torch.bool)
        self.gone_at: dict[int, Tensor] = {}
        self.alive = visual_runs(self.find_visual(ids))
        self.total = [len(image) for image in self.alive]
        return super().run(ids, features, forced)

    def hidden_keys(self, layer: int, keys: int) -> Tensor | None:
        """What is gone by this layer."""
        hidden = torch.zeros(keys, dtype=torch.bool)
        hidden[: len(self.gone)] = self.gone_at[layer]
        return hidden

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Remembers the weights; changes nothing."""
        if prefill:
            self.weights[layer] = weights
        return weights

    def places(self, gone: Tensor, past: int, rows: int) -> Tensor:
        """Positions of rows `past..`."""
        place = torch.arange(past, past + rows)
        if not self.renumber:
            return place
        before = torch.cat([torch.zeros(1, dtype=torch.long), gone.long().cumsum(0)])
        return place - before[place.clamp(max=len(gone))]

    def tables(self, gone: Tensor, x: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Rotary tables of those rows."""
        position = self.places(gone, past, len(x))
        cos, sin = (t[0].float() for t in self.lm.rotary_emb(x[None], position[None]))
        return cos, sin

    def _forward(self, x: Tensor, prefill: bool) -> Tensor:
        past = self.cache[0][0].shape[1]
        for layer, block in enumerate(self.lm.layers):
            if prefill:
                if layer in self.layers:
                    x = x.clone()
                    self.alive = self.decide(layer, x)
                    left = torch.cat(self.alive)
                    self.kept[layer] = left
                    self.gone = self.visual.clone()
                    self.gone[left] = False
                self.gone_at[layer] = self.gone.clone()
                self.before(layer, x)
            cos, sin = self.tables(self.gone_at[layer], x, past)
            attended = self._attention(layer, block.self_attn, block.input_layernorm(x), cos, sin, past, prefill)
            x = x + attended
            x = x + block.mlp(block.post_attention_layernorm(x))
        return self.model.get_output_embeddings()(self.lm.norm(x[-1:]))[0].float()

    def before(self, layer: int, x: Tensor) -> None:
        """Sees the residual stream of the prompt with which `layer` runs, after a cut there."""

    # -- helpers of decisions ----------------------------------------------------------------------------------------
    def own_row(self, layer: int, x: Tensor, rotary: bool = True) -> Tensor:
        """Last row of the layer about to run, read off its input: `[H, n]`, over what is left.

        Without rotary embedding the softmax runs over the visual tokens alone.
        """
        block = self.lm.layers[layer]
        normed = block.input_layernorm(x)
        attention = block.self_attn

        def split(projected: Tensor) -> Tensor:
            return projected.view(len(x), -1, self.head_dim).transpose(0, 1)

        q, k = split(attention.q_proj(normed)), split(attention.k_proj(normed))
        seen = ~self.gone
        if rotary:
            cos, sin = self.tables(self.gone, x, 0)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        else:
            seen = seen & self.visual
        out = torch.zeros(self.heads, len(x))
        group = self.heads // self.kv_heads
        for head in range(self.heads):
            logits = k[head // group][seen] @ q[head, -1] * attention.scaling
            out[head, seen] = logits.softmax(-1)
        return out

    def top(self, scores: Tensor, image: Tensor, k: int) -> Tensor:
        """The `k` best positions of one image by `scores [n]`, and the margin of that cut."""
        values = [float(scores[p]) for p in image]
        order = loops.ranked(values)
        if k < len(order):
            gap = values[order[k - 1]] - values[order[k]]
            self.margin = min(self.margin, gap / max(max(abs(v) for v in values), 1e-12))
        return image[sorted(order[:k])]


def whole_share(total: int, share: float) -> int:
    """`int(total * share)`, one at least."""
    return max(1, min(int(total * share), total))


class PyramidDrop(Staged):
    """Last row of the next layer, shares of the original count, positions renumbered."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] = (8, 16, 24),
        keep: Sequence[float] = (0.5, 0.25, 0.125),
        positions: str = "renumber",
        sigma: float | None = None,
    ) -> None:
        super().__init__(model, layers)
        self.keep = keep
        self.renumber = positions == "renumber"
        self.sigma = sigma

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        stage = self.layers.index(layer)
        scores = self.own_row(layer, x).mean(0)
        out = []
        for image, total in zip(self.alive, self.total, strict=True):
            mine = scores
            if self.sigma is not None and stage == 0:
                mine = scores.clone()
                mine[image] *= torch.tensor(loops.trend(total, self.sigma))
            out.append(self.top(mine, image, min(whole_share(total, self.keep[stage]), len(image))))
        return out


class HiMAP(Staged):
    """Sum over text rows after the image, then sum over the remaining visual rows."""

    def __init__(
        self, model: nn.Module, layers: Sequence[int] = (2, 8), keep: Sequence[int | float] = (0.5, 0.125)
    ) -> None:
        super().__init__(model, layers)
        self.keep = keep

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        stage = self.layers.index(layer)
        weights = self.weights[layer - 1].mean(0)
        rows = torch.cat(self.alive) if stage else text_rows(self.visual)
        scores = weights[rows].sum(0)
        return [
            self.top(scores, image, min(budget(self.keep[stage], total), len(image)))
            for image, total in zip(self.alive, self.total, strict=True)
        ]


class Feather(Staged):
    """Scores without rotary embedding, first with a uniform grid of stride 3, then without."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] = (8, 16),
        keep: Sequence[float] = (0.3, 0.09),
        stride: int = 3,
        side: int = 4,
    ) -> None:
        super().__init__(model, layers)
        self.keep, self.stride, self.side = keep, stride, side
        self.free: dict[int, Tensor] = {}

    def before(self, layer: int, x: Tensor) -> None:
        """The score comes from the layer before the cut, without its positions."""
        if layer + 1 in self.layers:
            self.free[layer + 1] = self.own_row(layer, x, rotary=False).mean(0)

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        stage = self.layers.index(layer)
        out = []
        for image, total in zip(self.alive, self.total, strict=True):
            count = whole_share(total if stage == 0 else len(image), self.keep[stage])
            best = set(self.top(self.free[layer], image, count).tolist())
            if stage == 0:
                for rank, position in enumerate(image.tolist()):
                    row, column = divmod(rank, self.side)
                    if row % self.stride == 0 and column % self.stride == 0:
                        best.add(position)
            out.append(torch.tensor(sorted(best)))
        return out


def text_rows(visual: Tensor) -> Tensor:
    """Positions of text that has some visual token before it."""
    seen = visual.cumsum(0) > 0
    return (seen & ~visual).nonzero()[:, 0]


class SparseVLM(Staged):
    """Rater rows; lists of counts for 576 tokens carried over by share; recycling (1.5) or ones-division (plus)."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] = (2, 6, 15),
        keep: Sequence[int] = (300, 200, 110),
        version: str = "1.5",
        seed: int = 0,
        heads: int = 14,
    ) -> None:
        super().__init__(model, [layer + 1 for layer in layers])
        self.keep, self.version, self.seed, self.used = keep, version, seed, heads
        self.renumber = version == "1.5"

    def before(self, layer: int, x: Tensor) -> None:
        """Raters come from the input embeddings."""
        if layer == 0:
            rows = text_rows(self.visual)
            chosen = loops.raters(x[rows], x[self.visual])
            self.raters = [int(r) for r, c in zip(rows, chosen, strict=True) if c]

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        stage = self.layers.index(layer)
        weights = self.weights[layer - 1].clone()
        left = torch.cat(self.alive)
        if self.version == "plus":
            theta = self.lm.rotary_emb.inv_freq.double()
            for r in self.raters:
                for s in left.tolist():
                    gain = sum(math.cos((r - s) * float(t)) for t in theta) / len(theta)
                    weights[:, r, s] /= max(gain, 0.1)
            mass = weights[:, self.raters][:, :, left].sum((1, 2)).tolist()
            weights = weights[loops.ranked(mass)[: self.used]]
        scores = weights[:, self.raters].mean((0, 1))
        out = []
        for image, total in zip(self.alive, self.total, strict=True):
            best = self.top(scores, image, min(budget(self.keep[stage], total), len(image)))
            if self.version == "1.5":
                best = self.recycle(x, scores, image, best)
            out.append(best)
        return out

    def recycle(self, x: Tensor, scores: Tensor, image: Tensor, best: Tensor) -> Tensor:
        """Clusters of the best 30 % of the pruned, averaged at their centres."""
        from tests.reference.kit_select import averaged, density_peaks

        rest = torch.tensor([p for p in image.tolist() if p not in best.tolist()], dtype=torch.long)
        if not len(rest):
            return best
        taken = self.top(scores, rest, min(int(0.3 * len(rest)) + 1, len(rest)))
        count = int(len(taken) / 10) + 1
        noise = torch.rand(len(taken), generator=torch.Generator().manual_seed(self.seed)).tolist()
        parent = density_peaks(x[taken], count, noise)
        for centre, row in averaged(x[taken], parent).items():
            x[taken[centre]] = torch.tensor(row)
        return torch.cat([best, taken[sorted(set(parent))]]).sort().values


class OneCut(Staged):
    """One cut by a rule on the residual stream at its input: `choose(features [n, D], k, text [t, D])`."""

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        keep: int | float | str,
        choose: Callable[[Tensor, int, Tensor], list[int]],
        positions: str = "keep",
    ) -> None:
        super().__init__(model, [layer])
        self.keep, self.choose = keep, choose
        self.renumber = positions == "renumber"

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        text = x[int(self.visual.nonzero()[-1]) + 1 :]
        return [
            image[self.choose(x[image], budget(self.keep, total, x[image].double().norm(dim=1).tolist()), text)]
            for image, total in zip(self.alive, self.total, strict=True)
        ]


class TokenCarve(Staged):
    """Borda of attention and singular values; the lower half of the best 1.5 r partly merges into the upper."""

    def __init__(self, model: nn.Module, layer: int = 2, keep: int | float = 0.2223, compact: bool = True) -> None:
        super().__init__(model, [layer])
        self.keep, self.compact = keep, compact

    def hidden_keys(self, layer: int, keys: int) -> Tensor | None:
        """Behind the prompt, the cut holds in the layers before it too."""
        if self.compact and keys > len(self.gone):
            layer = self.depth - 1
        return super().hidden_keys(layer, keys)

    def decide(self, layer: int, x: Tensor) -> list[Tensor]:
        """See `Staged.decide`."""
        from tests.reference.kit_select import averaged, join

        attention = self.weights[layer - 1][:, -1].mean(0)
        out = []
        for image, total in zip(self.alive, self.total, strict=True):
            r = min(budget(self.keep, total), len(image))
            pool = min(len(image), r + r // 2)
            information = loops.svd_energy(x[image])
            order = loops.ranked(loops.borda([float(attention[p]) for p in image], information))[:pool]
            half = pool - pool // 2
            parent = join(x[image], order[half:], order[:half], pool - r)
            means = averaged(x[image], parent)
            chosen = sorted(i for i in order if parent[i] == i)
            for i in chosen:
                x[image[i]] = torch.tensor(means[i])
            out.append(image[chosen])
        return out
