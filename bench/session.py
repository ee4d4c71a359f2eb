"""The rows of the benches as pytest runs them: what they will take, a line for each as it comes, and what they find."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

from bench.harness import QUICK, name
from bench.report import Report, ratios
from fastsae._core.timing import Stopwatch

ROW_SECONDS, QUICK_SECONDS = 12.0, 1.0
"""What a row takes on two cores where it does not say (``pytest.mark.seconds``): inputs, verification, the rounds, memory."""


class Session:
    """pytest's rows: a line each, in place of pytest's own report."""

    KEY = pytest.StashKey["Session"]()

    def __init__(self, kept: Report, minutes: float | None, only_list: bool):
        self.report, self.minutes, self.only_list = kept, minutes, only_list
        self.watch = Stopwatch()
        self.items: list[Any] = []
        self.left_out: list[str] = []
        self.begun = self.expected = self.spent = 0.0

    def say(self, text: str) -> None:
        print(f"[{self.watch.seconds():6.1f} s] {text}", file=sys.stderr, flush=True)

    def seconds(self, item: Any) -> float:
        """That a row is expected to take."""
        mark = item.get_closest_marker("seconds")
        return QUICK_SECONDS if QUICK else float(mark.args[0]) if mark else ROW_SECONDS

    def keep(self, **entry: Any) -> None:
        self.report.entries.append(entry)
        self.report.save()
        self.say(f"  {entry['op']} {entry['shape']}: {ratios(entry)}")

    # -- pytest's hooks

    @pytest.hookimpl(trylast=True)  # after it was registered
    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.unregister(name="terminalreporter")
        config.stash[self.KEY] = self

    def pytest_collection_finish(self, session: Any) -> None:
        self.items = session.items
        if not self.only_list and self.items:
            total = sum(map(self.seconds, self.items)) / 60
            within = "" if self.minutes is None else f"; {self.minutes:g} are allowed, and no row is begun that would pass them"
            self.say(f"{len(self.items)} rows, about {total:.0f} minutes on two cores{within}")

    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        """True: the row is left out."""
        speed = self.spent / self.expected if self.expected else 1.0  # this machine's seconds for one expected
        need = self.seconds(item) * speed
        if self.minutes is not None and self.watch.seconds() + need > self.minutes * 60:
            self.left_out.append(item.name)
            self.report.note(item.name, "", f"left out: about {need:.0f} s, {self.minutes:g} minutes were allowed")
            return True
        place = self.items.index(item)
        rest = sum(map(self.seconds, self.items[place:])) * speed / 60
        self.begun = self.watch.seconds()
        self.say(f"{place + 1} of {len(self.items)}, about {rest:.1f} minutes left: {item.name}")
        return None

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.spent += self.watch.seconds() - self.begun
        self.expected += next(self.seconds(item) for item in self.items if item.nodeid == nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            self.say(f"  {report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr}")
        elif report.failed:
            self.say(f"  FAILED\n{report.longreprtext}")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.say(f"{report.nodeid} cannot be read:\n{report.longreprtext}")

    def pytest_warning_recorded(self, warning_message: Any) -> None:
        if str(warning_message.message).startswith("bench: "):
            self.say(f"  {warning_message.message}")

    def table(self) -> Generator[str]:
        """A line for each operation: rows, minutes, shapes."""
        yield f"{'bench':<14} {'rows of it':<22} {'number':>6} {'minutes':>7}  shapes"
        groups: dict[tuple[str, str], list[Any]] = {}
        for item in self.items:
            groups.setdefault((item.path.stem.removeprefix("bench_"), item.originalname.removeprefix("test_")), []).append(item)
        for (bench, operation), items in groups.items():
            parameters = [item.callspec.params for item in items if hasattr(item, "callspec")]
            shapes = dict.fromkeys(name(p.get("shape") or p["n"]) for p in parameters if "shape" in p or "n" in p)
            yield f"{bench:<14} {operation:<22} {len(items):>6} {sum(map(self.seconds, items)) / 60:>7.1f}  {', '.join(shapes)}"
        yield f"{len(self.items)} rows, about {sum(map(self.seconds, self.items)) / 60:.0f} minutes on two cores"
