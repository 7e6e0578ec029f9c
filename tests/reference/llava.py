"""A LLaVA decoder spelled out: projections, rotary, softmax, output projection, MLP, and a cache of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN = -1e30


def image_features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Projected visual tokens `[images * tokens, D]` of `pixels` `[images, 3, S, S]`."""
    output = model.base_model.get_image_features(pixel_values=pixels, return_dict=True)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in output.pooler_output])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` `[heads, rows, d]` with tables `[rows, d]`, half-split layout."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


class Dense:
    """Runs one unpadded prompt and then forced tokens one at a time; methods override the hooks below."""

    pixels: Tensor
    """Pixels `[images, 3, S, S]` of the prompt, for methods that read the vision encoder."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.lm = model.get_decoder()
        self.depth = len(self.lm.layers)
        config = self.lm.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.image_id = model.config.image_token_id

    # -- hooks: what a method may change ---------------------------------------------------------------------------
    def on_layer_input(self, layer: int, x: Tensor, prefill: bool) -> None:
        """Sees the residual stream `[rows, D]` that enters `layer`."""

    def hidden_keys(self, layer: int, keys: int) -> Tensor | None:
        """Bool `[keys]` of the keys no other position may attend to in `layer`."""
        return None

    def edit_logits(self, layer: int, scores: Tensor, prefill: bool) -> Tensor:
        """Scaled scores `[H, rows, keys]` before mask and softmax in, scores out."""
        return scores

    def see(self, layer: int, visible: Tensor, prefill: bool) -> Tensor | None:
        """Factors `[rows, keys]` of `exp(score)`, given which pairs are visible; None = 1 and 0."""
        return None

    def edit_weights(self, layer: int, weights: Tensor, prefill: bool) -> Tensor:
        """Post-softmax weights `[H, rows, keys]` in, weights out."""
        return weights

    def edit_heads(self, layer: int, outputs: Tensor, prefill: bool) -> Tensor:
        """Head outputs before `o_proj` `[H, rows, d]` in, outputs out."""
        return outputs

    def find_visual(self, ids: Tensor) -> Tensor:
        """Bool `[n]`: image placeholders of the prompt."""
        return ids == self.image_id

    # -- the decoder -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def run(self, ids: Tensor, features: Tensor | None, forced: list[int] | Tensor = ()) -> Tensor:
        """Logits `[1 + len(forced), V]`: of the last prompt row, then after each forced token."""
        self.visual = self.find_visual(ids)
        self.cache: list[tuple[Tensor, Tensor]] = [
            (torch.empty(self.kv_heads, 0, self.head_dim), torch.empty(self.kv_heads, 0, self.head_dim))
            for _ in range(self.depth)
        ]
        x = self.lm.embed_tokens(ids).float()
        if features is not None:
            x = x.clone()
            x[self.visual] = features.float()
        rows = [self._forward(x, prefill=True)]
        for token in list(forced):
            rows.append(self._forward(self.lm.embed_tokens(torch.tensor([int(token)])).float(), prefill=False))
        return torch.stack(rows)

    def _forward(self, x: Tensor, prefill: bool) -> Tensor:
        past = self.cache[0][0].shape[1]
        rows = x.shape[0]
        position = torch.arange(past, past + rows)
        cos, sin = (table[0].float() for table in self.lm.rotary_emb(x[None], position[None]))
        for layer, block in enumerate(self.lm.layers):
            self.on_layer_input(layer, x, prefill)
            attended = self._attention(layer, block.self_attn, block.input_layernorm(x), cos, sin, past, prefill)
            x = x + attended
            x = x + block.mlp(block.post_attention_layernorm(x))
        return self.model.get_output_embeddings()(self.lm.norm(x[-1:]))[0].float()

    def _attention(
        self, layer: int, attention: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, past: int, prefill: bool
    ) -> Tensor:
        rows = x.shape[0]

        def split(projected: Tensor) -> Tensor:
            return projected.view(rows, -1, self.head_dim).transpose(0, 1)

        q = rotate(split(attention.q_proj(x)), cos, sin)
        k = rotate(split(attention.k_proj(x)), cos, sin)
        old_k, old_v = self.cache[layer]
        keys = torch.cat([old_k, k], dim=1)
        values = torch.cat([old_v, split(attention.v_proj(x))], dim=1)
        self.cache[layer] = (keys, values)
        total = keys.shape[1]
        i = torch.arange(past, total)[:, None]
        j = torch.arange(total)[None]
        visible = j <= i
        hidden = self.hidden_keys(layer, total)
        if hidden is not None:
            visible = visible & (~hidden[None] | (i == j))
        group = self.heads // self.kv_heads
        scores = torch.stack([q[head] @ keys[head // group].T for head in range(self.heads)]) * attention.scaling
        scores = self.edit_logits(layer, scores, prefill)
        factors = self.see(layer, visible, prefill)
        if factors is not None:
            visible = factors > 0
            scores = scores + torch.where(visible, factors, 1.0).log()
        weights = scores.masked_fill(~visible, HIDDEN).softmax(dim=-1)
        weights = self.edit_weights(layer, weights, prefill)
        outputs = torch.stack([weights[head] @ values[head // group] for head in range(self.heads)])
        outputs = self.edit_heads(layer, outputs, prefill)
        return attention.o_proj(outputs.transpose(0, 1).reshape(rows, -1))


def visual_runs(visual: Tensor, per_image: int | None = None) -> list[Tensor]:
    """Positions of each image's tokens: runs of consecutive placeholders (or pieces of `per_image`)."""
    positions = visual.nonzero()[:, 0]
    if per_image is not None:
        return list(positions.split(per_image))
    cuts = ((positions[1:] - positions[:-1]) != 1).nonzero()[:, 0] + 1
    return list(positions.tensor_split(cuts.tolist()))
