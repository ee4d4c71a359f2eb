"""The GPU table on the CPU with small shapes: what it stores, what a missing backend or a wrong result gives, what is kept of a cut run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import gpu  # noqa: E402

CPU = torch.device("cpu")


def stored(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*-gpu-quick.json")
    return json.loads(path.read_text())


@pytest.fixture
def bench(tmp_path: Path) -> gpu.Bench:
    return gpu.Bench(CPU, tmp_path, 1.0, True, {"gpu": [], "cpu": "A CPU"})


def test_a_table(tmp_path: Path) -> None:
    assert gpu.run(CPU, tmp_path, {"gpu": [], "cpu": "A CPU"}, minutes=1, quick=True, only=["copy", "encode_fp32", "select", "signs"]) == 0
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


def test_a_wrong_result_is_not_timed(bench: gpu.Bench, tmp_path: Path) -> None:
    def wrong(_: str) -> None:
        raise AssertionError("value 3 differs")

    bench.row("op", "1x2", {"cpu": lambda i: None}, {"other": lambda i: None}, verify=wrong)
    (entry,) = stored(tmp_path)["results"]
    assert "ours" not in entry
    assert "value 3 differs" in entry["failures"]["fastsae (cpu)"]


def test_a_rival_that_fails_is_named(bench: gpu.Bench, tmp_path: Path) -> None:
    def broken(_: int) -> None:
        raise RuntimeError("out of memory")

    bench.row("op", "1x2", {"cpu": lambda i: torch.ones(9).sum()}, {"other": broken, "third": lambda i: None}, floor="third")
    (entry,) = stored(tmp_path)["results"]
    assert entry["failures"] == {"other": "RuntimeError: out of memory"}
    assert list(entry["others"]) == ["third"]


def test_verdicts(bench: gpu.Bench) -> None:
    entry = {"ours": {"median": 3.0}, "others": {"floor": {"median": 2.0}}, "of_copy_rate": 0.8}
    assert "MISSED" in bench.verdict(("floor", 1.35, 1.1), entry)["text"]
    assert "must reached" in bench.verdict(("floor", 1.5, 1.1), entry)["text"]
    assert "goal reached" in bench.verdict(("floor", 2.0, 1.5), entry)["text"]
    assert "must reached" in bench.verdict(("copy", 0.7, 0.9), entry)["text"]
    assert "not measured" in bench.verdict(("absent", 1.5, 1.1), entry)["text"]
    entry["extra_mb"] = {"ours": 100.0}
    assert "must reached" in bench.verdict(("MiB", 256, 64), entry)["text"]
    assert "MISSED" in bench.verdict(("MiB", 64, 32), entry)["text"]


def test_inputs_pass_the_cache(bench: gpu.Bench) -> None:
    bench.quick = False
    assert bench.sets(1 << 22) * (1 << 22) >= 4 * bench.l2
    assert bench.sets(bench.l2 * 100) == 2


def test_a_killed_run_keeps_what_was_measured(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; sys.path.insert(0, '.')\n"
        "from bench import gpu\n"
        "def die(b): os.kill(os.getpid(), int(sys.argv[2]))\n"
        "def never(b): raise SystemExit(7)\n"
        "gpu.ROWS = [(gpu.signs, 1), (die, 1), (never, 1)]\n"
        "sys.exit(gpu.run(torch.device('cpu'), gpu.Path(sys.argv[1]), {'gpu': [], 'cpu': 'A CPU'}, minutes=1, quick=True))"
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
from bench import gpu
def hangs(b): time.sleep(100)
def breaks(b): gpu._clear = broken; raise RuntimeError("an illegal memory access was encountered")
def broken(b): raise RuntimeError("an illegal memory access was encountered")
def last(b): b.note("last", "", "measured")
gpu.ROWS = [(gpu.signs, 1), (breaks, 1), (hangs, 0), (last, 1)]
"""


def test_a_row_that_ends_its_process_is_survived(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(ROWS + "sys.exit(gpu.main())")
    watcher = f"command = [sys.executable, {str(child)!r}, '--device', 'cpu', '--quick', '--out', {str(tmp_path)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", ROWS + watcher + "sys.exit(gpu.supervise(command, grace=2))"],
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
def test_says_that_there_is_no_gpu(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_row_runs_in_quick_mode(bench: gpu.Bench) -> None:
    """All but those that the tests above run and torch.compile's."""
    for row, _ in gpu.ROWS:
        if row.__name__ not in ("copy", "encode_fp32", "signs", "encode_compiled", "select", "graphs"):
            row(bench)
    failed = {entry["op"]: entry["failures"] for entry in bench.entries if any(who.startswith("fastsae") for who in entry["failures"])}
    assert not failed
    assert {"decode float32", "decode_dweight bfloat16", "match_cosine", "training step", "hamming_topk"} <= {
        e["op"] for e in bench.entries
    }
