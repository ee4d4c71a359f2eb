"""Progress of long calls, on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Bar:
    """tqdm's bar; without tqdm a line where something is shown, and every ten seconds. Where stderr is no terminal a bar is drawn every ten
    seconds too. of: what is counted, in one word; label: what for."""

    def __init__(self, wanted: bool, total: int | None, start: int = 0, of: str = "step", label: str | None = None):
        self.bar: Any = None
        stderr = sys.stderr
        self.wanted, self.step, self.total, self.of, self.label = wanted and stderr is not None, start, total, of, label
        self.said = time.monotonic()
        if wanted and stderr is not None:
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm

                interval = 0.5 if stderr.isatty() else 10
                self.bar = tqdm(total=total, initial=start, unit=f" {of}s", desc=label, mininterval=interval)

    def update(self, steps: int = 1) -> None:
        self.step += steps
        if self.bar is not None:
            self.bar.update(steps)
        elif time.monotonic() - self.said > 10:
            self.show("")

    def show(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        elif self.wanted:
            self.said = time.monotonic()
            of = "" if self.total is None else f" of {self.total}"
            print(f"{self.label or self.of} {self.step}{of}{': ' * bool(text)}{text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def track(items: Collection[T], label: str, wanted: bool = True) -> Iterator[T]:
    """``items`` with a bar, where it is wanted."""
    with Bar(wanted, len(items), label=label) as bar:
        for item in items:
            yield item
            bar.update()
