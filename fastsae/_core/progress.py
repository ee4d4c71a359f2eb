"""Progress of long calls, on stderr."""

from __future__ import annotations

import sys


class Bar:
    """tqdm's bar, or a line on stderr every time something is shown. of: what is counted, in one word."""

    def __init__(self, wanted: bool, total: int | None, start: int = 0, of: str = "step"):
        self.bar, self.wanted, self.step, self.total, self.of = None, wanted, start, total, of
        if wanted:
            try:
                from tqdm.auto import tqdm

                self.bar = tqdm(total=total, initial=start, unit=f" {of}s", mininterval=0.5)
            except ImportError:
                pass

    def update(self, steps: int) -> None:
        self.step += steps
        if self.bar is not None:
            self.bar.update(steps)

    def show(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
        elif self.wanted:
            print(f"{self.of} {self.step}{'' if self.total is None else f' of {self.total}'}: {text}", file=sys.stderr)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
