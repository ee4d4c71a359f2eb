"""Settings of the whole suite: hypothesis profiles, and memory that shows when it is read before it was written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("dev", max_examples=10, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=20, deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)  # a busy machine is no failure
hypothesis.settings.register_profile("deep", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

os.environ.setdefault("FASTSAE_AUDIT", "off")  # what it would check at first use is checked by the suite

if os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":  # two workers: one with as many threads as there are, the others with one
    torch.set_num_threads(1)


if os.environ.get("TRITON_INTERPRET") and (chip := os.environ.get("FASTSAE_TENSOR_CORE")):
    sys.path.append(str(Path(__file__).parent / "gpu"))
    from tensor_core import interpret_on

    interpret_on(chip)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that no worker waits for one at the end: every other file of them in each half, where two workers begin."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    files = list(dict.fromkeys(item.path for item in slow))
    begin = [item for item in slow if item.path in files[::2]]
    rest, half = [item for item in items if item not in slow], len(items) // 2
    cut = max(half - len(begin), 0)
    items[:] = [*begin, *rest[:cut], *(item for item in slow if item.path in files[1::2]), *rest[cut:]]


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = make(*args, **kwargs)
        if result.device.type != "meta" and result.numel():
            # NaN, or an index that no check lets through.
            result.fill_(
                float("nan") if result.is_floating_point() else torch.iinfo(result.dtype).max if result.dtype is not torch.bool else True
            )
        return result

    return made


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh uninitialised tensors are full of NaN, or of the largest integer."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that leaves the GPU unusable (an illegal access) ends its worker: the others then run in a new one, and do not fail too."""
    report = yield
    if report.failed and os.environ.get("PYTEST_XDIST_WORKER") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception:
            capture = item.config.pluginmanager.getplugin("capturemanager")
            assert capture is not None
            with capture.global_and_fixture_disabled():  # pyright: ignore[reportAttributeAccessIssue]
                print(f"\n{item.nodeid} left the GPU unusable\n{report.longreprtext}", file=sys.stderr, flush=True)
            os._exit(1)
    return report
