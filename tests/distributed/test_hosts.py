"""Two hosts, each a network namespace with a card of its own and a slow link between them: cut, and mended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_runs import TIMEOUT
from places import ROOT, TESTS

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
HOSTS = ("fsae0", "fsae1")  # namespaces, whose cards are v-fsae0 ..
STEPS = 60
NETEM = ("netem", "rate", "1gbit", "delay", "1ms"), ("tbf", "rate", "1gbit", "burst", "64kb", "latency", "50ms")


def ip(*arguments: str, of: str = "") -> subprocess.CompletedProcess[str]:
    command = ["ip", *(["netns", "exec", of, *arguments] if of else arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def left_out() -> str | None:
    """Why there are no hosts."""
    if not DEEP:
        return "in make deep"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs ip and tc of iproute2"
    made = ip("netns", "add", "fsae-try")
    ip("netns", "del", "fsae-try")
    return f"needs root: {made.stderr.strip()}" if made.returncode else None


@pytest.fixture
def link() -> Iterator[str]:
    """What limits it."""
    if reason := left_out():
        if DEEP:
            warnings.warn(f"hosts are not tested: {reason}", stacklevel=1)
        pytest.skip(reason)
    for host in HOSTS:
        ip("netns", "del", host)
        assert not ip("netns", "add", host).returncode
    try:
        ip("link", "add", "v-fsae0", "netns", HOSTS[0], "type", "veth", "peer", "name", "v-fsae1", "netns", HOSTS[1])
        for number, host in enumerate(HOSTS):
            ip("ip", "addr", "add", f"10.231.7.{number + 1}/24", "dev", f"v-{host}", of=host)
            for card in (f"v-{host}", "lo"):
                ip("ip", "link", "set", card, "up", of=host)
        limits = [
            rule for rule in NETEM if not any(ip("tc", "qdisc", "replace", "dev", f"v-{h}", "root", *rule, of=h).returncode for h in HOSTS)
        ]
        if not limits or limits[0] is not NETEM[0]:
            warnings.warn(f"no netem in this kernel, so no delay: the link has {limits or 'no limit'}", stacklevel=1)
        yield " ".join(limits[0]) if limits else "no limit"
    finally:
        for host in HOSTS:
            ip("netns", "del", host)


def launch(number: int, folder: Path, port: int, steps: int) -> subprocess.Popen[str]:
    host, file = HOSTS[number], TESTS / "distributed/host_runs.py"
    paths = [str(ROOT), str(TESTS), str(TESTS / "distributed")]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"v-{host}", "PYTHONPATH": os.pathsep.join(paths)}
    command = [
        "ip",
        "netns",
        "exec",
        host,
        sys.executable,
        str(file),
        str(number),
        "2",
        f"10.231.7.1:{port}",
        str(folder),
        str(steps),
        f"v-{host}",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def both(processes: list[subprocess.Popen[str]], within: float) -> list[tuple[int, str, str]]:
    out = []
    try:
        for process in processes:
            said, errors = process.communicate(timeout=within)
            out.append((process.returncode, said, errors))
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
    return out


@pytest.mark.slow
def test_a_link_that_is_cut_and_mended(link: str, tmp_path: Path) -> None:
    whole = both([launch(number, tmp_path / "whole", 7001, STEPS) for number in range(2)], 600)
    assert [code for code, _, _ in whole] == [0, 0], whole
    for _, said, _ in whole:  # bytes as counted, and what TCP adds
        found = re.search(r"(\d+) sent, (\d+) on the wire; (.*) s a step", said)
        assert found is not None
        assert int(found[1]) < int(found[2]) < 1.15 * int(found[1]), said
        print(f"{link}: {found[0]}")

    processes = [launch(number, tmp_path / "cut", 7002, STEPS) for number in range(2)]
    out = processes[0].stdout
    assert out is not None
    while "step 33" not in (line := out.readline()):
        assert line or processes[0].poll() is None
    assert not ip("ip", "link", "set", f"v-{HOSTS[0]}", "down", of=HOSTS[0]).returncode
    clock = time.monotonic()
    cut = both(processes, 60)
    assert time.monotonic() - clock < TIMEOUT + 10, cut
    for number, (code, _, errors) in enumerate(cut):
        assert code == 1 and "RankError" in errors and f"has not answered within {TIMEOUT:g} s; rank {number} ends" in errors, errors

    assert not ip("ip", "link", "set", f"v-{HOSTS[0]}", "up", of=HOSTS[0]).returncode
    ip("ip", "addr", "replace", "10.231.7.1/24", "dev", f"v-{HOSTS[0]}", of=HOSTS[0])
    mended = both([launch(number, tmp_path / "cut", 7003, STEPS) for number in range(2)], 600)
    assert [code for code, _, _ in mended] == [0, 0], mended
    ends = [re.findall(r"end (\w+)", said) for _, said, _ in (whole[0], mended[0])]
    assert ends[0] == ends[1] and len(ends[0]) == 1, ends
    assert "step 0\n" not in mended[0][1] and f"step {STEPS - 1}\n" in mended[0][1]
