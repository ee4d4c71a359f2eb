"""The GPU table on the CPU with small shapes: what it stores, what a missing backend or a wrong result gives, what is kept of a cut run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from places import ROOT

sys.path.insert(0, str(ROOT))

from bench.gpu import rows, table
from bench.gpu.harness import Bench
from fastsae._core.machine import machine

CPU = torch.device("cpu")
DEEP = pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "deep", reason="make deep runs it")
A_CPU = {**machine(), "gpu": [], "cpu": "A CPU"}


def stored(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*-gpu-quick.json")
    return json.loads(path.read_text())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(CPU, tmp_path, 1.0, True, A_CPU)


def test_a_table(tmp_path: Path) -> None:
    assert table.run(CPU, tmp_path, A_CPU, minutes=1, quick=True, only=["copy", "encode_fp32", "select", "signs"]) == 0
    report = stored(tmp_path)
    assert report["copy_bytes_per_second"] > 0
    entries = {entry["op"]: entry for entry in report["results"]}
    assert {"encode_topk float32", "pack_signs bfloat16", "hash_signs bfloat16"} <= set(entries)
    encode = entries["encode_topk float32"]
    assert encode["floor"] in encode["others"]
    for times in (encode["ours"], *encode["others"].values()):
        assert 0 < times["min"] <= times["median"] <= times["max"]
        assert times["rounds"] >= 5
    assert "targets" not in encode  # a GPU's targets, at its own shapes
    assert entries["pack_signs bfloat16"]["of_copy_rate"] > 0
    (note,) = [note for note in report["notes"] if note["op"] == "select"]
    assert "no backend but the reference serves select_topk" in note["note"]
    assert "device cpu (supported: cuda)" in note["note"]
    (plot,) = tmp_path.glob("*-a-cpu-gpu-quick.png")
    assert plot.stat().st_size > 0


def test_a_wrong_result_is_not_timed(bench: Bench, tmp_path: Path) -> None:
    def wrong(_: str) -> None:
        raise AssertionError("value 3 differs")

    bench.row("op", "1x2", {"cpu": lambda i: None}, {"other": lambda i: None}, verify=wrong)
    (entry,) = stored(tmp_path)["results"]
    assert "ours" not in entry
    assert "value 3 differs" in entry["failures"]["fastsae (cpu)"]


def test_a_rival_that_fails_is_named(bench: Bench, tmp_path: Path) -> None:
    def broken(_: int) -> None:
        raise RuntimeError("out of memory")

    bench.row("op", "1x2", {"cpu": lambda i: torch.ones(9).sum()}, {"other": broken, "third": lambda i: None}, floor="third")
    (entry,) = stored(tmp_path)["results"]
    assert entry["failures"] == {"other": "RuntimeError: out of memory"}
    assert list(entry["others"]) == ["third"]


def test_verdicts(bench: Bench) -> None:
    entry = {"ours": {"median": 3.0}, "others": {"floor": {"median": 2.0}}, "of_copy_rate": 0.8}
    assert "MISSED" in bench.verdict(("floor", 1.35, 1.1), entry)["text"]
    assert "must reached" in bench.verdict(("floor", 1.5, 1.1), entry)["text"]
    assert "goal reached" in bench.verdict(("floor", 2.0, 1.5), entry)["text"]
    assert "must reached" in bench.verdict(("copy", 0.7, 0.9), entry)["text"]
    assert "not measured" in bench.verdict(("absent", 1.5, 1.1), entry)["text"]
    entry["extra_mb"] = {"ours": 100.0}
    assert "must reached" in bench.verdict(("MiB", 256, 64), entry)["text"]
    assert "MISSED" in bench.verdict(("MiB", 64, 32), entry)["text"]


def test_inputs_pass_the_cache(bench: Bench) -> None:
    bench.quick = False
    assert bench.sets(1 << 22) * (1 << 22) >= 4 * bench.l2
    assert bench.sets(bench.l2 * 100) == 2


@DEEP
@pytest.mark.slow
def test_a_killed_run_keeps_what_was_measured(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from bench.gpu import rows, table\n"
        "from bench.gpu.rows import Row, codes\n"
        "def die(b): os.kill(os.getpid(), int(sys.argv[2]))\n"
        "def never(b): raise SystemExit(7)\n"
        "rows.ROWS[:] = [Row(codes.signs, 1, ''), Row(die, 1, ''), Row(never, 1, '')]\n"
        f"sys.exit(table.run(torch.device('cpu'), Path(sys.argv[1]), {A_CPU!r}, minutes=1, quick=True))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, signal, returned in (("TERM", 15, 0), ("KILL", 9, -9)):
        folder = tmp_path / name
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(signal)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == returned, done.stderr
        assert [entry["op"] for entry in stored(folder)["results"]] == ["pack_signs bfloat16", "hash_signs bfloat16"]
        assert bool(list(folder.glob("*.png"))) == (name == "TERM")


ROWS = """
import os, sys, time; sys.path.insert(0, '.')
from bench.gpu import rows
from bench.gpu.__main__ import main
from bench.gpu.rows import Row, codes
from bench.gpu.supervise import supervise
def hangs(b): time.sleep(100)
def breaks(b): b.clear = broken; raise RuntimeError("an illegal memory access was encountered")
def broken(): raise RuntimeError("an illegal memory access was encountered")
def last(b): b.note("last", "", "measured")
rows.ROWS[:] = [Row(codes.signs, 1, ""), Row(breaks, 1, ""), Row(hangs, 0, ""), Row(last, 1, "")]
"""


@pytest.mark.slow
def test_a_row_that_ends_its_process_is_survived(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(ROWS + "sys.exit(main())")
    watcher = f"command = [sys.executable, {str(child)!r}, '--device', 'cpu', '--quick', '--out', {str(tmp_path)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", ROWS + watcher + "sys.exit(supervise(command, grace=2))"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    report = stored(tmp_path)
    assert [entry["op"] for entry in report["results"]] == ["pack_signs bfloat16", "hash_signs bfloat16"]
    notes = {note["op"]: note["note"] for note in report["notes"]}
    assert "illegal memory access" in notes["breaks"]
    assert notes["hangs"].startswith("failed: killed after")
    assert notes["last"] == "measured"
    assert list(tmp_path.glob("*.png"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "fastsae", "bench", "--device", "cuda"],
        ["bash", "bench/gpu.sh", "build/gpu-test"],
    ],
    ids=["command", "script"],
)
@pytest.mark.slow
def test_says_that_there_is_no_gpu(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


STUB = """#!/usr/bin/env bash
echo "$*" >> "$STUB_CALLS"
case "$*" in
  *get_device_capability*) echo 90 ;;
  *"print(max("*) echo 3.5 ;;
  *"import xdist"*) exit 1 ;;
  "-m pip"*) exit "$STUB_PIP" ;;
  *test_contract*) echo "1 failed"; exit 1 ;;
  *"fastsae info"*) sleep "$STUB_SLEEP" ;;
esac
"""


def run_script(folder: Path, parts: str, *, pip: int = 0, seconds: int = 100, sleep: int = 0) -> tuple[int, str, list[str]]:
    """(exit code, log, what was asked of Python) of bench/gpu.sh with a Python that only notes what it is asked."""
    for name in ("bench", "fastsae", "kernels"):
        (folder / name).mkdir()
    for name in ("gpu.sh", "gpu_sanitize.sh"):
        shutil.copy(ROOT / "bench" / name, folder / "bench" / name)
    stub, calls = folder / "python", folder / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "STUB_CALLS": str(calls), "STUB_PIP": str(pip), "STUB_SLEEP": str(sleep)}
    environment |= {"FASTSAE_GPU_PARTS": parts, "FASTSAE_GPU_SECONDS": str(seconds)}
    done = subprocess.run(["bash", "bench/gpu.sh", "out"], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, (folder / "out" / "gpu.log").read_text(), calls.read_text().splitlines()


def test_the_script_runs_its_parts_in_order(tmp_path: Path) -> None:
    code, log, calls = run_script(tmp_path, "build verify bench tune")
    assert code == 1
    assert "1 failed" in log
    assert "exit code 1" in log
    assert "a part FAILED" in log
    known = ["pip install", "fastsae info", "test_tiles", "test_contract", "bench --device", "tune_gpu"]
    assert [name for call in calls for name in known if name in call] == known
    assert any(f"--minutes 3.5 --out {tmp_path}/out" in call for call in calls)
    assert os.listdir(tmp_path / "out") == ["gpu.log"]


def test_the_script_builds_in_place_where_pip_fails(tmp_path: Path) -> None:
    code, log, calls = run_script(tmp_path, "build", pip=1)
    assert code == 0, log
    assert any("setup.py -q build_ext --inplace" in call for call in calls)
    assert (tmp_path / "fastsae" / "kernels").resolve() == tmp_path / "kernels"


@pytest.mark.slow
def test_the_script_keeps_its_time(tmp_path: Path) -> None:
    code, log, _ = run_script(tmp_path, "build tune", seconds=6, sleep=30)
    assert code == 1
    assert "124: over its" in log
    assert "NOT RUN, no time left" in log


def test_the_script_knows_its_parts(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "bench/gpu.sh"], cwd=ROOT, env={**os.environ, "FASTSAE_GPU_PARTS": "build all"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown part all" in done.stderr


TUNE = """
import sys; sys.path.insert(0, '.')
from bench import tune_gpu
works = tune_gpu.workloads
tune_gpu.workloads = lambda b, dtypes: [work for work in works(b, dtypes[1:]) if work.name.startswith("spline")]
sys.exit(tune_gpu.main(["--device", "cpu", "--quick", "--out", sys.argv[1]]))
"""


@DEEP
@pytest.mark.slow
def test_the_tuner_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TUNE, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 2 and "cannot run loops under numpy" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-tiles-quick.json")
    report = json.loads(path.read_text())
    assert report["results"]
    assert all("ours" in entry and not entry["failures"] for entry in report["results"]), report["results"]
    assert set(report["winners"]) == {"spline_hash float32", "all"}


def test_the_tuner_offers_what_fits() -> None:
    pytest.importorskip("triton")
    from bench import tune_gpu

    start = tune_gpu.now(CPU)
    for limit in (99 << 10, 227 << 10):
        configs = tune_gpu.shapes(start, limit, quick=False)
        assert len(configs) > 8
        assert all(config.shared_bytes() * config.programs <= limit for config in configs)
        assert len(set(configs)) == len(configs)
    assert any(c.tile.rows * c.tile.columns == 128 * 128 and c.programs == 2 for c in tune_gpu.shapes(start, 227 << 10, quick=False))


@DEEP
@pytest.mark.slow
@pytest.mark.skipif(emulation.compiler() is None, reason="no C++ compiler: the CUDA C++ kernels were NOT run")
def test_the_sanitizers_program_in_the_emulation() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTSAE_CUDA_EMULATION": str(emulation.module_path())}
    command = [sys.executable, "-m", "bench.gpu_check", "cuda", "6", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "samples of cuda rows agree" in done.stdout
    from bench import gpu_check

    pytest.importorskip("triton")
    assert {"emit_kernel", "decode_kernel", "adam_kernel"} <= set(gpu_check.kernels())


def test_moved_keeps_strides() -> None:
    from bench.gpu_check import moved

    base = torch.arange(24.0).reshape(4, 6)
    for view in (base, base.T, base[1::2, 2:], base[0].expand(3, 6), base[:0]):
        assert moved(view, CPU) is view
        meta = moved(view, torch.device("meta"))
        assert (meta.shape, meta.stride(), meta.storage_offset()) == (view.shape, view.stride(), view.storage_offset())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_every_row_runs_in_quick_mode(bench: Bench) -> None:
    """All but those that the tests above run and torch.compile's; in CI none that is another's at other sizes."""
    again = () if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else ("encode_smaller", "growth", "optimisers")
    for row in rows.ROWS:
        if row.name not in ("copy", "encode_fp32", "signs", "encode_compiled", "select", "graphs", *again):
            row.measure(bench)
    failed = {
        entry["op"]: entry["failures"] for entry in bench.report.entries if any(who.startswith("fastsae") for who in entry["failures"])
    }
    assert not failed
    assert {"decode float32", "decode_dweight bfloat16", "match_cosine", "training step", "hamming_topk"} <= {
        e["op"] for e in bench.report.entries
    }
