"""Everything a session knows about the request in flight. Never stored on modules, dropped with the next prefill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention.plans import Labelled, Remembered
from .families import Media
from .stages import EncoderScore, KeyMap, RowScore, Words
from .tokens import TokenMap

Count = Callable[[], int | Tensor]
"""How many triples an edit changed, worked out when it is called."""
GATHERED = 1024
HELD = 2**20  # numbers that closures may hold together until they are called

if TYPE_CHECKING:
    from .streams import TextStream


@dataclass
class PruneStage:
    """What one site kept.

    Attributes:
        layer: first layer that runs on the kept slots (0 = language-model input).
        idx: int64 ``[B, n]`` kept slots, ascending, as indices into the sequence that entered layer 0.
        valid: bool ``[B, n]``, False at filler slots of samples that kept fewer.
        tokens: roles of the kept slots.
        before: int64 ``[B, n]``, tokens that left in front of each slot, when positions are renumbered.
        gone: int64 ``[B]``, tokens that left in all, when positions are renumbered.
    """

    layer: int
    idx: Tensor
    valid: Tensor
    tokens: TokenMap
    before: Tensor | None = None
    gone: Tensor | None = None
    cache: dict[int, Any] = field(default_factory=dict, repr=False)
    shifted: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Pictured:
    """Samples with visual tokens: bool ``rows [B, 1]``, and whether they are ``some`` or ``every`` one."""

    tokens: TokenMap
    rows: Tensor
    some: bool
    every: bool


@dataclass
class Request:
    """Per-request state of one session.

    Attributes:
        keys: per layer, what its ``k_proj`` gave ahead of its run, ``[B, N, W]``, until the layer takes it.
        spared: per layer, the share of the keys projected ahead that the layer did not have to project again.
    """

    tokens: TokenMap
    prompt_kwargs: dict[str, Any] = field(default_factory=dict, repr=False)
    media: dict[str, Media] = field(default_factory=dict, repr=False)
    stages: list[PruneStage] = field(default_factory=list)
    entered: TokenMap | None = None
    seen: int = 0
    prefilled: bool = False
    scores: dict[RowScore, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict, repr=False)
    notes: dict[str, Any] = field(default_factory=dict, repr=False)
    labels: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    labelled: dict[tuple[int, int], Labelled] = field(default_factory=dict, repr=False)
    remembered: dict[tuple[int, int], Remembered] = field(default_factory=dict, repr=False)
    biases: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    factors: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    maps: dict[tuple[int, int], KeyMap] = field(default_factory=dict, repr=False)
    shared_maps: dict[int, tuple[TokenMap, KeyMap]] = field(default_factory=dict, repr=False)
    memory: dict[int, Any] = field(default_factory=dict, repr=False)
    encoder: dict[EncoderScore, Tensor] = field(default_factory=dict, repr=False)
    words: Words | None = None
    text: TextStream | None = field(default=None, repr=False)
    times: dict[str, float] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict, repr=False)
    spared: dict[int, float] = field(default_factory=dict)
    cache_id: int | None = None
    compacted: PruneStage | None = None
    _pictured: dict[int, Pictured] = field(default_factory=dict, repr=False)
    _edited: dict[int, int] = field(default_factory=dict, repr=False)
    _changed: list[tuple[int, Count]] = field(default_factory=list, repr=False)
    _held: int = 0
    _uncounted: list[tuple[int, int | Tensor]] = field(default_factory=list, repr=False)

    @property
    def edited(self) -> dict[int, int]:
        """Per layer: (sample, head, row) triples that edits changed so far."""
        self._count()
        return self._edited

    def _count(self) -> None:
        self._compare()
        for layer, count in self._uncounted:
            if number := int(count):
                self._edited[layer] = self._edited.get(layer, 0) + number
        self._uncounted.clear()

    def _compare(self) -> None:
        self._uncounted += [(layer, changed()) for layer, changed in self._changed]
        self._changed.clear()
        self._held = 0

    def count(self, layer: int, changed: Count, held: int = 0) -> None:
        """Notes what an edit changed. Work that no layer has to wait for is put off: it is cheaper in one go.

        Args:
            changed: called once it holds too much together with others, at the latest when somebody asks; the number
                itself, which waits for the device, is read when somebody asks or many have gathered.
            held: how many numbers ``changed`` keeps in memory.
        """
        self._changed.append((layer, changed))
        self._held += held
        if self._held >= HELD:
            self._compare()
        if len(self._uncounted) + len(self._changed) >= GATHERED:
            self._count()

    def stage_at(self, layer: int) -> PruneStage | None:
        """The stage whose kept slots layer ``layer`` runs on; behind the prompt, those that its cache holds."""
        return self._processed(layer) or self.compacted

    def _processed(self, layer: int) -> PruneStage | None:
        found = None
        for stage in self.stages:
            if stage.layer <= layer:
                found = stage
        return found

    def tokens_at(self, layer: int) -> TokenMap:
        """Roles of the prompt keys of one layer."""
        stage = self.stage_at(layer)
        return self.tokens if stage is None else stage.tokens

    def pictured(self, layer: int) -> Pictured:
        """The samples of which a visual token reaches ``layer``."""
        stage = self.stage_at(layer)
        tokens = self.tokens if stage is None else stage.tokens
        first = 0 if stage is None else stage.layer
        found = self._pictured.get(first)
        if found is None or found.tokens is not tokens:
            rows = tokens.vis.any(1, keepdim=True)
            found = self._pictured[first] = Pictured(tokens, rows, bool(rows.any()), bool(rows.all()))
        return found

    def kept(self, layer: int) -> list[Tensor]:
        """Per sample: positions (in the padded prompt) of the visual tokens that reach ``layer``."""
        stage = self._processed(layer)
        tokens = self.tokens if stage is None else stage.tokens
        return [tokens.index[row][tokens.vis[row]] for row in range(tokens.batch)]

    def kept_visual(self, layer: int) -> list[Tensor]:
        """Per sample: ranks ``0..N-1`` among the sample's visual tokens of those that reach ``layer``."""
        rank = self.tokens.vis.cumsum(1) - 1
        return [rank[row][positions] for row, positions in enumerate(self.kept(layer))]

    def kept_per_layer(self, layers: int) -> Tensor:
        """int64 ``[B, layers]``: visual tokens that every layer processes."""
        stages = [self._processed(layer) for layer in range(layers)]
        return torch.stack([(self.tokens if s is None else s.tokens).vis.sum(1) for s in stages], dim=1)
