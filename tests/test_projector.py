"""The projector by itself: fp32 whatever the model's type, low rank only where it saves work, factors kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vlm_attn import projector
from vlm_attn.kit.scores import low_rank
from vlm_attn.projector import Projector


def module(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 30)).to(dtype).requires_grad_(False)


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_in_fp32(dtype: torch.dtype) -> None:
    bridge = module(dtype)
    assert torch.equal(Projector(bridge)(X), copy.deepcopy(bridge).float()(X))
    assert bridge[0].weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_stands_in_where_it_is_less_work(dtype: torch.dtype) -> None:
    bridge = module(dtype)
    expected = copy.deepcopy(bridge).float()
    left, right = low_rank(expected[2].weight, 8)
    expected[2].weight.copy_(left @ right)  # 8 x 46 numbers would be more than the first layer's 240
    assert torch.allclose(Projector(bridge).of_rank(8)(X), expected(X), atol=1e-5)
    assert torch.equal(Projector(bridge).of_rank(30)(X), Projector(bridge)(X))
    assert "forward" not in bridge[2].__dict__


def test_factors_are_computed_once_per_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(projector, "low_rank", lambda weight, rank: [asked.append(rank), low_rank(weight, rank)][1])
    bridge = module()
    before = Projector(bridge).of_rank(8)(X)
    assert torch.equal(Projector(bridge).of_rank(8)(X), before)
    Projector(bridge).of_rank(6)(X)
    assert asked == [8, 6]
    bridge[2].weight.mul_(2)
    after = Projector(bridge).of_rank(8)(X)
    assert asked == [8, 6, 8]
    assert torch.allclose(after - bridge[2].bias, 2 * (before - bridge[2].bias), atol=1e-5)


def test_the_layers_come_back_when_the_module_fails() -> None:
    bridge = module()
    with pytest.raises(RuntimeError):
        Projector(bridge).of_rank(8)(X[..., :5])
    assert "forward" not in bridge[2].__dict__


def test_derivatives_are_those_of_low_rank() -> None:
    bridge = module()
    u = torch.randn(6, generator=torch.Generator().manual_seed(2))
    narrow = Projector(bridge).of_rank(8)
    tangent = torch.func.jvp(narrow, (X,), (u.expand_as(X),))[1]
    assert torch.allclose(tangent, (narrow(X + 0.01 * u) - narrow(X - 0.01 * u)) / 0.02, atol=1e-3)


@pytest.mark.parametrize("rank", [None, 8])
def test_split_before_the_last_linear_layer(rank: int | None) -> None:
    bridge = module()
    whole = Projector(bridge).of_rank(rank)
    before, behind = whole.split(X[0, :1])
    assert before(X).shape == (2, 5, 40)
    moved = whole(X) - whole(X.flip(1))
    assert torch.allclose(behind(before(X) - before(X.flip(1))).norm(dim=-1), moved.norm(dim=-1), atol=1e-5)
    assert moved.norm(dim=-1).max() > 0.1
    assert not bridge[2]._forward_hooks
    assert "forward" not in bridge[2].__dict__


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x).tanh())


@pytest.mark.parametrize("bridge", [nn.Sequential(nn.Linear(6, 9), nn.GELU()), Twice()], ids=["gelu", "twice"])
def test_nothing_is_split_off_what_does_not_end_in_a_linear_layer_of_its_own(bridge: nn.Module) -> None:
    whole = Projector(bridge.requires_grad_(False))
    before, behind = whole.split(X)
    assert torch.equal(behind(before(X)), bridge(X))
