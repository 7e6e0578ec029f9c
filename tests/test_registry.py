"""Plug-ins that cannot be used: said by name, the rest goes on."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

import pytest

from vlm_attn import registry


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """The entry points of the group; what a test appends counts as installed."""
    points = list(entry_points(group=registry.GROUP))
    monkeypatch.setattr(registry, "entry_points", lambda **_: points)
    registry._classes.cache_clear()
    yield points
    registry._classes.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("mine", "no_such_package:Mine", "no_such_package:Mine: ModuleNotFoundError"),
        ("mine", "vlm_attn_methods.noop:nothing", "AttributeError"),
        ("mine", "vlm_attn.session:Session", "not a vlm_attn Method class"),
        ("mine", "vlm_attn_methods.noop:Noop", "calls itself 'noop'"),
        (
            "fastv",
            "other_package:FastV",
            "several packages offer it \\(other_package:FastV, vlm_attn_methods.fastv:FastV",
        ),
    ],
)
def test_one_broken_plug_in_stops_none_of_the_others(
    installed: list[EntryPoint], name: str, value: str, reason: str
) -> None:
    before = len(installed) - (name == "fastv")
    installed.append(EntryPoint(name, value, registry.GROUP))
    with pytest.warns(UserWarning, match=f"method '{name}' cannot be used: .*{reason}"):
        assert len(registry.methods()) == before
    with pytest.raises(ValueError, match=f"method '{name}' cannot be used: .*{reason}"):
        registry.method(name)
    assert registry.method("noop").name == "noop"


def test_the_same_package_on_two_paths_is_one(installed: list[EntryPoint]) -> None:
    installed.append(next(point for point in installed if point.name == "fastv"))
    assert "fastv" in {row.name for row in registry.methods()}
