"""Progress in the terminal: one line for the whole run, one for the benchmark at hand; plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Bar", "RunProgress", "single_bar", "terminal"]

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Given the number of samples, a context that hands out ``advance(samples)``."""


def terminal(*, quiet: bool = False) -> Console:
    """Standard error as it is now (also while libraries' output is redirected); 120 columns where it is a log."""
    console = Console(file=sys.stderr, quiet=quiet)
    return console if console.is_terminal else Console(file=sys.stderr, quiet=quiet, width=120)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", table_column=None),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )


@contextmanager
def single_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of its own, for use outside our runner."""
    with _progress(terminal()) as progress:
        task = progress.add_task("vlm_attn", total=total)
        yield lambda n: progress.advance(task, n)


class RunProgress:
    """Bars of a run: ``start_method`` moves the upper one, ``bar`` is a `Bar` for the lower one."""

    def __init__(self, console: Console, columns: int) -> None:
        self.console = console
        self.progress = _progress(console)
        self._run = self.progress.add_task("methods", total=columns)
        self._samples = self.progress.add_task("", total=None, visible=False)
        self._started = monotonic()
        self.title = ""

    def __enter__(self) -> RunProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def finish_method(self, label: str) -> None:
        """One method is through all benchmarks; a log gets a line."""
        self.progress.advance(self._run)
        if not self.console.is_terminal:
            self.console.print(f"{label}: done after {monotonic() - self._started:.0f} s", highlight=False)

    @contextmanager
    def bar(self, total: int) -> Iterator[Callable[[int], None]]:
        self.progress.reset(self._samples, total=total, visible=True, description=self.title)
        yield lambda n: self.progress.advance(self._samples, n)
        self.progress.update(self._samples, visible=False)
