"""The order of choice, requests that cannot be served, explanations, and that a backward pass keeps the backend of its forward.

The table itself is that of this machine; where a test needs rows of known behaviour it adds some to a copy.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae import dispatch
from fastsae.__main__ import main
from fastsae.dispatch import OPS, BackendError, Choice, Row, explain, use_backend

DECODE = OPS["decode"]
LATENTS = fastsae.TopKLatents(torch.ones(3, 2), torch.tensor([[0, 1], [2, 3], [4, 4]]), 5)
W = torch.arange(20.0).reshape(5, 4)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Decode with rows that note when they run: cpu serves float32, triton refuses always, the reference serves everything."""
    ran: list[str] = []

    def row(backend: str, refuses: Any) -> Row:
        def run(*args: Any) -> Any:
            ran.append(backend)
            return DECODE.reference(*args)

        return Row(backend, run, refuses)

    monkeypatch.setattr(
        DECODE,
        "rows",
        [
            row("cpu", lambda values, *_: None if values.dtype is torch.float32 else f"dtype {values.dtype} (supported: float32)"),
            row("triton", lambda *_: "no GPU today"),
            row("reference", None),
        ],
    )
    monkeypatch.delenv("FASTSAE_BACKEND", raising=False)
    return ran


def decode(dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    return fastsae.decode(fastsae.TopKLatents(LATENTS.values.to(dtype), LATENTS.indices, 5), W.to(dtype), **options)


def test_the_order_of_rows(rows: list[str]) -> None:
    decode()
    decode(torch.float64)
    assert rows == ["cpu", "reference"]


def test_argument_then_block_then_variable_then_rows(rows: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSAE_BACKEND", "reference")
    decode()
    with use_backend("cpu"):
        decode()
        decode(backend="reference")
        with use_backend("reference"):
            decode()
        decode()
    decode()
    monkeypatch.setenv("FASTSAE_BACKEND", "")
    decode()
    assert rows == ["reference", "cpu", "reference", "reference", "cpu", "reference", "cpu"]


def test_a_list_is_an_order_of_preference(rows: list[str]) -> None:
    decode(backend="triton,cpu")
    decode(backend="triton, reference")
    decode(backend="reference,cpu")
    decode(backend="triton,*")
    decode(torch.float64, backend="triton,cpu,*")
    decode(backend="cuda,*")
    assert rows == ["cpu", "reference", "reference", "cpu", "reference", "cpu"]


@pytest.mark.parametrize("request_", ["triton", "cuda", "triton,cuda"])
def test_nothing_falls_back_in_silence(rows: list[str], request_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError):
        decode(backend=request_)
    with use_backend(request_), pytest.raises(BackendError):
        decode()
    monkeypatch.setenv("FASTSAE_BACKEND", request_)
    with pytest.raises(BackendError):
        decode()
    assert rows == []


def test_a_refusal_lists_every_row_with_its_reason(rows: list[str]) -> None:
    with pytest.raises(BackendError) as caught:
        decode(torch.float64, backend="cpu,triton,cuda")
    text = str(caught.value)
    for part in (
        "decode: backend 'cpu,triton,cuda' was requested and cannot serve",
        "[3, 2] float64 cpu, [3, 2] int64 cpu, [5, 4] float64 cpu",
        "cpu        dtype torch.float64 (supported: float32)",
        "triton     no GPU today",
        "reference  accepts",
        "cuda       has no implementation of decode",
        "'cpu,triton,cuda,*'",
    ):
        assert part in text, text


@pytest.mark.parametrize("wrong", ["gpu", "cpu,gpu", "CPU", "cpu;triton", "**"])
def test_unknown_names(rows: list[str], wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in (lambda: decode(backend=wrong), lambda: use_backend(wrong).__enter__()):
        with pytest.raises(ValueError, match="known: cpu, triton, cuda, reference"):
            run()
    monkeypatch.setenv("FASTSAE_BACKEND", wrong)
    with pytest.raises(ValueError, match="known: cpu, triton, cuda, reference"):
        decode()
    assert rows == []


def test_the_block_is_left_after_an_exception(rows: list[str]) -> None:
    def fails() -> None:
        with use_backend("reference"):
            decode()
            with pytest.raises(BackendError), use_backend("triton"):
                decode()
            decode()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    decode()
    assert rows == ["reference", "reference", "cpu"]


def test_threads_have_their_own_request(rows: list[str]) -> None:
    started, finish = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        with use_backend("reference"):
            started.set()
            finish.wait(10)
            decode()
            seen.append(rows[-1])

    thread = threading.Thread(target=other)
    thread.start()
    started.wait(10)
    decode()
    assert rows == ["cpu"]
    finish.set()
    thread.join()
    assert seen == ["reference"]


# ---------------------------------------------------------------- backward


@pytest.fixture
def gradient_rows(rows: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As ``rows``, for the two gradients too."""
    for name in ("decode_dvalues", "decode_dweight"):
        op = OPS[name]

        def note(backend: str, op: Any = op) -> Row:
            return Row(backend, lambda *args: (rows.append(f"{op.name} {backend}"), op.reference(*args))[1])

        monkeypatch.setattr(op, "rows", [note("cpu"), note("reference")])
    return rows


def tracked() -> tuple[fastsae.TopKLatents, torch.Tensor]:
    return fastsae.TopKLatents(LATENTS.values.clone().requires_grad_(), LATENTS.indices, 5), W.clone().requires_grad_()


@pytest.mark.parametrize("how", ["argument", "block"])
def test_backward_keeps_the_backend_of_its_forward(gradient_rows: list[str], how: str) -> None:
    for backend in ("reference", "cpu"):
        gradient_rows.clear()
        if how == "argument":
            y = fastsae.decode(*tracked(), backend=backend)
        else:
            with use_backend(backend):
                y = fastsae.decode(*tracked())
        y.sum().backward()  # outside of the block
        assert gradient_rows == [backend, f"decode_dvalues {backend}", f"decode_dweight {backend}"]


def test_backward_in_another_thread_keeps_the_backend(gradient_rows: list[str]) -> None:
    with use_backend("reference"):
        y = fastsae.decode(*tracked())
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert gradient_rows == ["reference", "decode_dvalues reference", "decode_dweight reference"]


def test_backward_inside_another_block_keeps_the_backend(gradient_rows: list[str]) -> None:
    y = fastsae.decode(*tracked(), backend="reference")
    with use_backend("cpu"):
        y.sum().backward()
    assert gradient_rows == ["reference", "decode_dvalues reference", "decode_dweight reference"]


def test_the_gradients_of_an_encoder_keep_its_backend(gradient_rows: list[str]) -> None:
    x = torch.ones(2, 4, requires_grad=True)
    with use_backend("reference"):
        latents = fastsae.encode_topk(x, W.clone().requires_grad_(), k=2)
    latents.values.sum().backward()
    assert set(gradient_rows) == {"reference", "decode_dweight reference"}


def test_a_helper_of_a_backward_may_continue_with_the_order_of_rows(rows: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that has a forward only does not make the backward fail."""
    for name in ("decode_dvalues", "decode_dweight"):
        monkeypatch.setattr(OPS[name], "rows", OPS[name].rows[-1:])
    latents, weight = tracked()
    fastsae.decode(latents, weight, backend="cpu").sum().backward()
    assert weight.grad is not None


# ---------------------------------------------------------------- explain, describe, warn


def test_explain(rows: list[str]) -> None:
    explanation = explain(decode, torch.float64)
    assert [choice.op for choice in explanation.choices] == ["decode"]
    choice = explanation.choices[0]
    assert choice.chosen == "reference"
    assert choice.reasons == (("cpu", "dtype torch.float64 (supported: float32)"), ("triton", "no GPU today"), ("reference", None))
    assert choice.seconds > 0
    text = str(explanation)
    assert text.splitlines()[0] == "decode: reference"
    assert "  triton     no GPU today" in text.splitlines()
    assert "  reference  chosen" in text.splitlines()
    assert "  reference  accepts" in str(explain(decode)).splitlines()


def test_explain_lists_every_operation_in_order(gradient_rows: list[str]) -> None:
    def step() -> None:
        y = fastsae.decode(*tracked())
        fastsae.ops.decode.decode_backward(torch.ones_like(y), LATENTS, W)

    assert [choice.op for choice in explain(step).choices] == ["decode", "decode_dvalues", "decode_dweight"]
    # Nothing is recorded afterwards, nor after an exception.
    with pytest.raises(ZeroDivisionError):
        explain(lambda: 1 / 0)
    assert explain(lambda: None).choices == ()


def test_explain_nests(rows: list[str]) -> None:
    inner: list[Any] = []
    outer = explain(lambda: (inner.append(explain(decode)), decode(backend="reference")))
    assert [choice.chosen for choice in inner[0].choices] == ["cpu"]
    assert [choice.chosen for choice in outer.choices] == ["reference"]


def test_a_choice_is_printed_with_one_line_a_row() -> None:
    text = str(Choice("decode", "cpu", (("cpu", None), ("triton", "no GPU"), ("reference", None))))
    assert text.splitlines() == ["decode: cpu", "  cpu        chosen", "  triton     no GPU", "  reference  accepts"]


def test_describe() -> None:
    args = (torch.zeros(2, 3), None, torch.zeros(0, dtype=torch.int64), 4, "x")
    assert dispatch.describe(args) == "[2, 3] float32 cpu, [0] int64 cpu, 4, 'x'"


def test_the_reference_on_a_gpu_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    argument = torch.zeros(1).as_subclass(OnGpu)
    with pytest.warns(UserWarning, match=r"fastsae: count_codes runs its PyTorch reference on cuda"):
        OPS["count_codes"].choose((argument,), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPS["count_codes"].choose((argument,), None)
        OPS["count_codes"].choose((torch.zeros(1),), None)


# ---------------------------------------------------------------- the table itself


def test_every_operation_ends_with_its_reference() -> None:
    for op in OPS.values():
        assert op.rows[-1].backend == "reference"
        assert op.rows[-1].run() is op.reference
        assert op.rows[-1].refuses is None
        assert len({row.backend for row in op.rows}) == len(op.rows)
        assert all(row.backend in dispatch.BACKENDS for row in op.rows)


def test_every_row_resolves_or_says_why_not() -> None:
    """An import string with a typing error would look like a slow machine."""
    for op in OPS.values():
        args = next(iter(op.samples(torch.device("cpu"), op.dtypes[0], torch.Generator())))
        for row in op.rows:
            reason = row.reason(args)
            assert reason is None or len(reason) > 5
            if reason is None:
                assert callable(row.run())


def test_rows_are_added_before_the_reference_and_in_order() -> None:
    rows = list(DECODE.rows)
    try:
        DECODE.rows = rows[-1:]
        DECODE.row("cuda", "nowhere:decode")
        DECODE.row("triton", "nowhere:decode", "nowhere:refuses")
        assert [row.backend for row in DECODE.rows] == ["cuda", "triton", "reference"]
        with pytest.raises(ValueError, match="unknown backend 'gpu'"):
            DECODE.row("gpu", "nowhere:decode")
        with pytest.raises(ModuleNotFoundError, match="nowhere"):  # a broken row is an error, not a refusal
            decode()
    finally:
        DECODE.rows = rows


def test_the_request_travels_into_a_compiled_function(rows: list[str]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda values: fastsae.decode(fastsae.TopKLatents(values, LATENTS.indices, 5), W), fullgraph=True, backend="aot_eager"
    )
    compiled(LATENTS.values)
    with use_backend("reference"):
        compiled(LATENTS.values)
    assert rows == ["cpu", "reference"]


def test_commands_with_a_wrong_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--backend", "gpu", "--ops", "decode"]) == 2
    assert "unknown name 'gpu'" in capsys.readouterr().err
    monkeypatch.setenv("FASTSAE_BACKEND", "reference")
    assert main(["info"]) == 0
    assert "request FASTSAE_BACKEND=reference, before the order below" in capsys.readouterr().out
    monkeypatch.setenv("FASTSAE_BACKEND", "gpu")
    assert main(["info"]) == 0
    assert "request FASTSAE_BACKEND: unknown name 'gpu'" in capsys.readouterr().out

    def interrupt(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastsae.commands.info.run", interrupt)
    assert main(["info"]) == 130
    assert "fastsae info: interrupted" in capsys.readouterr().err


def test_commands_say_what_is_wrong_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("x")
    for name in ("demo/random/train", "study/init"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "demo/random/train/activations.json").write_text("x")
    for arguments, message in (
        (["demo", "--smoke", "--out", "file/x"], "file/x"),
        (["demo", "--smoke", "--out", "demo"], "(--fresh makes what lies in"),
        (["study", "init", "--smoke", "--out", "file/x"], "file/x"),
        (["study", "init", "--smoke", "--out", "file"], "file"),
        (["study", "--pages", "nothing"], "no NAME/NAME.json of a study in"),
        (["study", "--pages", "study"], "study/init/init.json is not what a study wrote"),
    ):
        for content in ("x", "[]", '{"study": 3}', '{"study": "init"}') if arguments[-1] == "study" else ("x",):
            (tmp_path / "study/init/init.json").write_text(content)
            assert main([*arguments[:-1], str(tmp_path / arguments[-1])]) == 2
            said = capsys.readouterr().err.strip().splitlines()[-1]
            assert said.startswith(f"fastsae {arguments[0]}: ") and message in said and str(tmp_path) in said


def test_commands_whose_output_nobody_takes(capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe, contextlib.redirect_stdout(pipe):
        assert main(["study"]) == 0  # `fastsae study | head -1`
    assert capsys.readouterr().err == ""
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
            assert main(["study"]) == 2
        assert capsys.readouterr().err == "fastsae study: [Errno 28] No space left on device\n"
