"""``fastsae bench`` on the CPU: what it lists, keeps and leaves out, and the clock that everything is measured with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from fastsae.__main__ import main
from fastsae._core.timing import Stopwatch, alternate, milliseconds, spread


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("matplotlib")
    return subprocess.run([sys.executable, "-m", "fastsae", "bench", *arguments], cwd=ROOT.parent, capture_output=True, text=True)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    done = bench("--list", "match", "polytopes")
    assert done.returncode == 0, done.stderr
    lines = {tuple(line.split()[:2]): line for line in done.stdout.splitlines()}
    assert "4096x4096x512, 16384x16384x768" in lines["match", "match_cosine"]
    assert float(lines["polytopes", "crossings"].split()[3]) > 5
    assert "minutes on two cores" in done.stdout.splitlines()[-1]
    assert main(["bench", "--list", "--device", "cuda"]) == 0
    table = capsys.readouterr().out
    assert "encode_bf16" in table and "8192x4096x131072x64" in table


def test_rows_are_kept(tmp_path: Path) -> None:
    done = bench("hamming", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "1 of 3, about" in done.stderr and "minutes on two cores" in done.stderr
    (path,) = tmp_path.glob("*-hamming-quick.json")
    report = json.loads(path.read_text())
    assert [entry["op"] for entry in report["results"]] == ["hamming", "hamming_topk", "hamming_topk"] and report["notes"] == []
    for entry in report["results"]:
        for times in (entry["ours"], *entry["others"].values()):
            assert 0 < times["min"] <= times["median"] <= times["max"] and times["rounds"] >= 5
    assert path.with_suffix(".png").exists()


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    done = bench("hamming", "--quick", "--minutes", "0", "--out", str(tmp_path))
    assert done.returncode != 0
    assert "left out, 0 minutes were allowed: test_hamming[256x256x128]" in done.stderr and "no figures were taken" in done.stderr


def test_unknown_bench_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "encoding"]) == 2
    assert "unknown encoding; known: adam, clt, decode" in capsys.readouterr().err


def test_turns() -> None:
    seen: list[tuple[str, int]] = []
    ways = {who: lambda turn, who=who: float(seen.append((who, turn)) or turn) for who in "ab"}
    assert alternate(ways, least=2, most=5, seconds=0) == {"a": [0, 1], "b": [0, 1]}
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert alternate(ways, least=1, most=4, seconds=60)["b"] == [0, 1, 2, 3]
    assert alternate(ways, least=9, most=9, seconds=60, late=lambda: True)["a"] == [0, 1]
    assert alternate({}, least=2, most=5, seconds=1) == {}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": 3}


def test_the_clock() -> None:
    calls: list[int] = []
    watch = Stopwatch()
    assert milliseconds(calls.append, repeat=3, first=4) > 0 and calls == [4, 5, 6]
    assert 0 < watch.seconds() < 60 and watch.cpu_seconds() >= 0
