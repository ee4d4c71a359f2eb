"""Kernels that prove themselves: a wrong row is caught at its first use, by a child or by the user's own call, disabled and reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_marks import CPU, interpreted, usable

from fastsae import audit
from fastsae._core import processes
from fastsae.dispatch import OPS, BackendError, Row
from fastsae.native import loader
from fastsae.ops.decode import DECODE, DECODE_DWEIGHT
from fastsae.verify import affordable, call, child

ROWS = """
import os, signal
from fastsae.native import decode as native

def wrong(*args):
    return native.decode(*args) + 0.01

def crashes(*args):
    os.kill(os.getpid(), signal.SIGILL)

def wrong_in_long_batches(values, *args):
    return native.decode(values, *args) + (values.shape[0] > 100)

def forgets(*args):
    native.decode_dweight(*args)
    args[-1][:1] += 0.01

def wrong_triton(*args):
    from fastsae.kernels import decode
    return decode.decode(*args) * 1.01
"""
Use = Callable[..., Row]


def drawn(rows: int) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, generator=g), torch.randint(0, 9, (rows, 3), generator=g), None, torch.randn(9, 5, generator=g), None


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Gives an operation's row another function, on a kind of machine that nobody knows, with an empty cache."""
    (tmp_path / "odd_rows.py").write_text(ROWS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTSAE_AUDIT", "first")
    monkeypatch.setenv("FASTSAE_QUIET", "1")
    monkeypatch.setattr(audit, "known", lambda backend: False)
    monkeypatch.setattr(audit, "_warned", set())
    monkeypatch.setattr(processes, "ranks", lambda: 1)

    def run(op: Any, target: str, backend: str = "cpu") -> Row:
        row = next(row for row in op.rows if row.backend == backend)
        monkeypatch.setattr(row, "refuses", row.refuses)
        monkeypatch.setattr(row, "target", target)
        return row

    return run


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.Guard, "_passes_in_a_child", lambda *args: True)


def caught(args: tuple[Any, ...], backend: str, what: str) -> None:
    """The first call warns and has the reference's result, the next ones never reach the row."""
    with pytest.warns(UserWarning, match=what):
        result = DECODE(*args, backend=backend)
    assert torch.equal(result, DECODE.reference(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(DECODE(*args, backend=f"{backend},reference"), result)
    with pytest.raises(BackendError, match="disabled: wrong on"):
        DECODE(*args, backend=backend)
    assert not audit.certified(audit.place(CPU))


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("wrong", r"decode cpu float32 is wrong on .* sample 0: error above.* Please report it with what `fastsae info` prints"),
        ("crashes", "decode cpu float32 is wrong on .* a process that ran it died of signal 4"),
    ],
)
def test_a_child_finds(target: str, what: str, use: Use) -> None:
    use(DECODE, f"odd_rows:{target}")
    caught(drawn(4), "cpu", what)


def test_the_users_own_call_finds(use: Use, no_child: None) -> None:
    use(DECODE, "odd_rows:wrong_in_long_batches")
    caught(drawn(101), "cpu", "decode cpu float32 is wrong on .* error above 2 x plain PyTorch")


def test_what_is_written_is_found_before_it_is_written(use: Use, no_child: None) -> None:
    use(DECODE_DWEIGHT, "odd_rows:forgets")
    values, indices, _, W, _ = drawn(30)
    out = torch.full_like(W, float("nan"))
    with pytest.warns(UserWarning, match="decode_dweight cpu float32 is wrong on"):
        DECODE_DWEIGHT(values, indices, None, torch.ones(30, 5), out, backend="cpu")
    want = torch.empty_like(W)
    DECODE_DWEIGHT.reference(values, indices, None, torch.ones(30, 5), want)
    assert torch.equal(out, want)


def test_among_several_processes_it_raises(use: Use, no_child: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use(DECODE, "odd_rows:wrong_in_long_batches")
    monkeypatch.setattr(processes, "ranks", lambda: 2)
    with pytest.raises(RuntimeError, match="fastsae: decode cpu float32 is wrong on"):
        DECODE(*drawn(101), backend="cpu")
    with pytest.raises(BackendError, match="disabled"):
        DECODE(*drawn(101), backend="cpu")


def test_agreement_is_remembered(use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children, run = [], audit.Guard._passes_in_a_child
    monkeypatch.setattr(audit.Guard, "_passes_in_a_child", lambda self, *args: children.append(args) or run(self, *args))
    for _ in range(2):  # as in a second process
        row = use(DECODE, "fastsae.native.decode:decode")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = DECODE(*drawn(4), backend="cpu")
        guard = row.target
        assert isinstance(guard, audit.Guard)
        assert guard.ready == {(torch.float32, CPU): guard.function}  # one look, then the function itself
        assert torch.equal(result, guard.function(*drawn(4)))
    assert len(children) == 1
    assert json.loads(audit.certificates().read_text()) == {audit.kind(loader.isa()): ["decode cpu float32"]}
    assert not list(tmp_path.glob("cache/fastsae/.*"))
    audit.certificates().write_text("[1, {")  # what somebody else wrote there is nothing
    assert audit.certified(loader.isa()) == []
    audit.remember(loader.isa(), ["x"])
    assert audit.certified(loader.isa()) == ["x"]


def test_no_home_is_no_error(use: Use, no_child: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    row = use(DECODE, "fastsae.native.decode:decode")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DECODE(*drawn(4), backend="cpu")
    assert isinstance(row.target, audit.Guard)
    assert row.target.ready


def test_where_no_child_can_run_the_call_itself_is_compared(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_CHILD", "raise SystemExit(3)")
    row = use(DECODE, "fastsae.native.decode:decode")
    with pytest.warns(UserWarning, match=r"decode cpu float32 could not be checked in a process of its own \(3\), so only on this call"):
        DECODE(*drawn(4), backend="cpu")
    assert isinstance(row.target, audit.Guard)
    assert row.target.ready
    assert not audit.certificates().exists()


def test_every_nth_call(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAE_AUDIT", "3")
    monkeypatch.setattr(audit, "known", lambda backend: True)
    use(DECODE, "odd_rows:wrong_in_long_batches")
    for rows in (101, 101, 4, 101, 101):  # the third is right
        DECODE(*drawn(rows), backend="cpu")
    caught(drawn(101), "cpu", "decode cpu float32 is wrong on")


def test_off_and_known_kinds_pay_nothing(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    row = use(DECODE, "odd_rows:wrong")
    monkeypatch.setattr(audit, "known", lambda backend: True)
    DECODE(*drawn(2), backend="cpu")
    assert getattr(row.target, "__name__", "") == "wrong"
    use(DECODE, "odd_rows:wrong")
    monkeypatch.setattr(audit, "known", lambda backend: False)
    monkeypatch.setenv("FASTSAE_AUDIT", "off")
    DECODE(*drawn(2), backend="cpu")
    assert getattr(row.target, "__name__", "") == "wrong"
    monkeypatch.setenv("FASTSAE_AUDIT", "sometimes")
    with pytest.raises(ValueError, match="FASTSAE_AUDIT must be first, off or a number of calls, got 'sometimes'"):
        audit.mode()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 alone is known")
def test_the_level_here_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for level in ("portable", *loader.isa_levels()[-1:], "avx512", "avx1024"):
        monkeypatch.setattr(loader, "isa", lambda level=level: level)
        assert audit.known("cpu") is (level in ("portable", "avx2", "avx512_vnni", "avx512_bf16"))


def test_a_captured_graph_is_not_checked(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    row = use(DECODE, "odd_rows:wrong")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(audit, "place", lambda device: gpu)
    monkeypatch.setattr(audit, "kind", str)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match="nor can it be while a CUDA graph is captured: run `fastsae verify` before"):
        DECODE(*drawn(2), backend="cpu")
    assert isinstance(row.target, audit.Guard)
    assert not row.target.ready


def test_parts_of_calls_are_calls() -> None:
    """On every operation's samples, the part is small, is taken by the rows, and they are right on it."""
    for op in OPS.values():
        taken = 0
        for args in op.samples(CPU, op.dtypes[0], torch.Generator().manual_seed(0)):
            part = audit.few(op, args)
            for row in op.rows[:-1] if part is not None else ():
                if row.reason(part) is None and affordable(row, CPU, part):  # pyright: ignore[reportArgumentType]
                    op.check(part, call(op, row, part))  # pyright: ignore[reportArgumentType]
                    taken += 1
        assert taken or all(row.backend not in ("cpu", "triton") for row in op.rows), op.name
    values, indices, _, W, _ = drawn(200)
    part = audit.few(DECODE, (values, indices, None, W[:2].T.contiguous().T, None))
    assert part is not None
    assert (part[0].shape, part[3].stride()) == ((8, 3), (1, 2))


def test_the_child(capsys: pytest.CaptureFixture[str], use: Use) -> None:
    use(DECODE, "fastsae.native.decode:decode")
    child("pack_signs", "cpu", "fastsae.native.spline:pack_signs", "cpu", "float16")
    assert capsys.readouterr().out == "passed"
    child("decode", "cpu", "fastsae.native.decode:decode", "cpu", "float64")
    assert capsys.readouterr().out == "took none of the samples"


# ---------------------------------------------------------------- in Triton's interpreter


@interpreted
@usable
def test_a_wrong_triton_kernel(use: Use) -> None:
    use(DECODE, "odd_rows:wrong_triton", "triton")
    caught(drawn(4), "triton", r"decode triton float32 is wrong on .* sample 0: error above")


STEPS = """
import torch, fastsae
from fastsae.dispatch import OPS
x = torch.randn(32, 16)
for name in ("TopK(4)", "BatchTopK(4)", "AbsTopK(4)", "ReLU()", "JumpReLU(0.5)", "Gated()"):
    for kind in ("Adam", "Signum"):
        sae = fastsae.SAE(16, 64, eval(f"fastsae.{name}"), dense=False)
        optimiser = getattr(fastsae.optim, kind)(sae, lr=1e-3, **({"clip": 1.0} if kind == "Adam" else {}))
        for _ in range(2):
            optimiser.step(x)
fastsae.match(sae, sae)
fastsae.check()
"""


def test_every_call_of_a_training_step_can_be_compared() -> None:
    """Whatever arguments the library itself gives its operations."""
    environment = {**os.environ, "FASTSAE_AUDIT": "1", "FASTSAE_QUIET": "1"}
    done = subprocess.run([sys.executable, "-W", "error:fastsae", "-c", STEPS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "could not be compared" not in done.stderr, done.stderr[-2000:]
