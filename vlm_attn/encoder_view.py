"""What a pruning method sees of the vision encoder: one layer's attention inputs and the features that came out."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UnsupportedError
from .kit.scores import attention_row, received_attention
from .projector import Projector
from .tokens import TokenMap


@dataclass(frozen=True)
class Picture:
    """One picture at the layer that was asked for; ``H`` heads of width ``d``, ``N`` patches in raster order.

    Attributes:
        query, key, value: ``[H, (1 +) N, d]``, the class token first where the encoder has one.
        scaling: factor of the logits.
        class_token: whether it has one.
        features: ``[N, d_v]``, what the projector receives.
        alive: bool ``[N]``, patches that did not leave inside the encoder; None where none can.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    class_token: bool
    features: Tensor
    alive: Tensor | None = None

    @property
    def attention(self) -> Tensor:
        """Attention on the patches, fp32 ``[H, N]``: of the class token, or the mean received where there is none
        [unverified stand-in].
        """
        if self.class_token:
            return attention_row(self.query[:, 0], self.key, self.scaling)[:, 1:]
        return torch.stack([received_attention(q[None], k[None], self.scaling) for q, k in zip(self.query, self.key)])

    @property
    def received(self) -> Tensor:
        """Attention that each patch receives, mean over heads and queries, fp32 ``[N]``."""
        return received_attention(self.query, self.key, self.scaling)[int(self.class_token) :]

    @property
    def keys(self) -> Tensor:
        """Keys of the patches ``[H, N, d]``."""
        return self.key[:, int(self.class_token) :]

    @property
    def wide(self) -> Tensor:
        """Attention with all heads as a single one, fp32 ``[N]``, logits scaled by the root of the full width."""
        query, key = (x.transpose(0, 1).flatten(1) for x in (self.query, self.key))
        scaling = key.shape[-1] ** -0.5
        if self.class_token:
            return attention_row(query[:1], key[None], scaling)[0, 1:]
        return received_attention(query[None], key[None], scaling)


@dataclass(frozen=True)
class EncoderView:
    """The pictures of the batch, looked up by sample and image.

    Attributes:
        tapped: query, key, value ``[P, H, n, d]`` and scaling at the layer that was asked for.
        features: ``[P, N, d_v]``.
        pictures: per sample, per image: which of the ``P`` it is.
        projector: the module that maps features to the language model's width.
        alive: bool ``[P, N]``, patches that did not leave inside the encoder; None where none can.
    """

    tapped: tuple[Tensor, Tensor, Tensor, float]
    features: Tensor
    pictures: tuple[tuple[int, ...], ...]
    class_token: bool
    projector: nn.Module
    alive: Tensor | None = None

    def picture(self, row: int, image: int) -> Picture:
        """One picture of one sample."""
        number = self.pictures[row][image]
        query, key, value, scaling = self.tapped
        alive = None if self.alive is None else self.alive[number]
        return Picture(
            query[number], key[number], value[number], scaling, self.class_token, self.features[number], alive
        )

    @functools.cached_property
    def project(self) -> Projector:
        """The projector on ``[..., d_v]``, computed and returned in fp32."""
        return Projector(self.projector)


def encoder_view(
    tapped: tuple[Tensor, Tensor, Tensor, float] | None,
    features: Tensor | None,
    class_token: bool,
    projector: nn.Module,
    tokens: TokenMap,
    name: str,
    alive: Tensor | None = None,
) -> EncoderView:
    """Builds the view and checks that visual tokens are the encoder's patches.

    Raises:
        UnsupportedError: finished features were given, or visual tokens are no patches of the encoder.
    """
    if tapped is None or features is None:
        raise UnsupportedError(f"{name} reads the vision encoder at work: pass pixel_values, not finished features")
    count, patches = tapped[1].shape[0], tapped[1].shape[2] - int(class_token)
    sizes = {len(layout) for row in tokens.layouts for layout in row}
    images = sum(len(row) for row in tokens.layouts)
    if features.dim() != 3 or features.shape[:2] != (count, patches) or sizes != {patches} or images % count:
        raise UnsupportedError(
            f"{name} needs one visual token per patch of the encoder: it made {patches} patches for each of {count} "
            f"pictures, the prompt has {images} images of {sorted(sizes)} visual tokens"
        )
    times = images // count  # beams and several return sequences repeat each sample
    pictures, start = [], 0
    for row in range(0, tokens.batch, times):
        mine = tuple(range(start, start + tokens.images(row)))
        pictures += [mine] * times
        start += len(mine)
    return EncoderView(tapped, features, tuple(pictures), class_token, projector, alive)
