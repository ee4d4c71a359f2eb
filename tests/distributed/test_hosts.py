"""Two hosts, each a network namespace with a card of its own and a slow link between them: cut, and mended."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from host_runs import TIMEOUT
from places import ROOT, TESTS

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
HOSTS = ("fsae0", "fsae1")  # namespaces, whose cards are v-fsae0 ..
STEPS = 60
RATE, DELAY = 1e9, 1e-3  # bits a second; seconds from card to card
ROUND_TRIP = """
import socket, time
clock = time.monotonic()
socket.socket().connect_ex(("10.231.7.2", 9))  # nobody listens: the refusal is the answer
print(time.monotonic() - clock)
"""


def ip(*arguments: str, of: str = "") -> subprocess.CompletedProcess[str]:
    command = ["ip", *(["netns", "exec", of, *arguments] if of else arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def left_out() -> str | None:
    """Why there are no hosts."""
    if not DEEP:
        return "in make deep"
    if shutil.which("ip") is None or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs ip of iproute2 and /dev/net/tun"
    made = ip("netns", "add", "fsae-try")
    ip("netns", "del", "fsae-try")
    return f"needs root: {made.stderr.strip()}" if made.returncode else None


def card(name: str) -> int:
    """A network card whose wire is a file descriptor: what it sends is read there, what is written there it receives."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1001))  # TUNSETIFF, IFF_TUN | IFF_NO_PI
    return end


def carry(ends: Sequence[int], done: threading.Event) -> None:
    """What one card sends reaches the other DELAY later, at RATE. (A kernel without netem has no qdisc that delays.)"""
    free, under_way = [0.0, 0.0], (deque[tuple[float, bytes]](), deque[tuple[float, bytes]]())
    while not done.is_set():
        select.select(ends, [], [], DELAY / 4 if any(under_way) else 0.1)
        now = time.monotonic()
        for side, packets in enumerate(under_way):
            with suppress(BlockingIOError):
                while packet := os.read(ends[side], 65536):
                    free[side] = max(free[side], now) + 8 * len(packet) / RATE
                    packets.append((free[side] + DELAY, packet))
            while packets and packets[0][0] <= now:
                with suppress(OSError):  # a card that is down receives nothing
                    os.write(ends[1 - side], packets.popleft()[1])


@pytest.fixture
def link() -> Iterator[str]:
    """What it is like."""
    if reason := left_out():
        if DEEP:
            warnings.warn(f"hosts are not tested: {reason}", stacklevel=1)
        pytest.skip(reason)
    ends, done = [card(f"v-{host}") for host in HOSTS], threading.Event()
    wire = threading.Thread(target=carry, args=(ends, done))
    try:
        for number, host in enumerate(HOSTS):
            ip("netns", "del", host)
            assert not ip("netns", "add", host).returncode
            assert not ip("link", "set", f"v-{host}", "mtu", "9000", "netns", host).returncode
            ip("ip", "addr", "add", f"10.231.7.{number + 1}/24", "dev", f"v-{host}", of=host)
            for name in (f"v-{host}", "lo"):
                assert not ip("ip", "link", "set", name, "up", of=host).returncode
        wire.start()
        took = float(ip(sys.executable, "-c", ROUND_TRIP, of=HOSTS[0]).stdout)
        assert took >= 2 * DELAY, took
        yield f"{RATE / 1e9:g} Gbit/s, round trip {1e3 * took:.2f} ms"
    finally:
        done.set()
        if wire.ident is not None:
            wire.join()
        for end in ends:
            os.close(end)
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
