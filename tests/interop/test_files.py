"""Files under faults: every failing call, full disks, killed processes, several writers, flipped bits, sizes that lie, other models."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fuzz_files
import numpy as np
import pytest
import torch
from file_cases import DEEP, D, checkpoint, full, rows, tree
from places import ROOT, TESTS
from torch import Tensor

from fastsae import SAE, SAEs, TopK, load_checkpoint, optim, save_checkpoint
from fastsae._core import files
from fastsae.codes import CodeCounter
from fastsae.formats.weight_files import read_tensors
from fastsae.trainer import Batches, Trainer

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # is called, which the counting tests see; no power fails here


def value_of(sae: SAE) -> int:
    values = {v for parameter in sae.parameters() for v in parameter.flatten().tolist()}
    assert len(values) == 1
    assert sae.dead_after == values.copy().pop() + 1, "weights of one save, configuration of another"
    return int(values.pop())


# ---------------------------------------------------------------- everything that is written


def counted(value: int) -> CodeCounter:
    counter = CodeCounter()
    counter.update(torch.arange(value + 1))
    return counter


class Canvas:
    def __init__(self, value: int):
        self.value = value

    def savefig(self, part: Path, dpi: int) -> None:
        assert part.suffix == ".png"
        part.write_text(str(self.value))


# (writes a value to a path, reads it)
KINDS: dict[str, tuple[Callable[[Path, int], Any], Callable[[Path], int]]] = {
    "save": (lambda path, value: full(value).save(path), lambda path: value_of(SAE.load(path))),
    "stack": (
        lambda path, value: SAEs([full(value), full(value)]).save(path),
        lambda path: max(value_of(member) for member in SAEs.load(path)),
    ),
    "saelens": (
        lambda path, value: full(value).save_pretrained(path, format="saelens"),
        lambda path: int(SAE.from_pretrained(path).W_dec.mean()),
    ),
    "sparsify": (
        lambda path, value: full(value).save_pretrained(path, format="sparsify"),
        lambda path: int(SAE.from_pretrained(path).W_dec.mean()),
    ),
    "dictionary_learning": (
        lambda path, value: full(value).save_pretrained(path, format="dictionary_learning"),
        lambda path: int(SAE.from_pretrained(path).W_dec.mean()),
    ),
    "checkpoint": (checkpoint, lambda path: value_of(load_checkpoint(path).sae)),
    "counter": (lambda path, value: counted(value).save(path), lambda path: CodeCounter.load(path).table()[0].seen - 1),
    "text": (lambda path, value: files.replace_text(path, str(value)), lambda path: int(path.read_text())),
    "figure": (
        lambda path, value: files.replace_figure(path.with_suffix(".png"), Canvas(value), dpi=1),
        lambda path: int(path.with_suffix(".png").read_text()),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Failing:
    """The n-th call of what writes raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.left = -1
        for module, name in ((os, "open"), (os, "fsync"), (os, "replace"), (os, "chmod")):
            monkeypatch.setattr(module, name, self.wrapped(getattr(module, name)))
        opened = self.wrapped(io.open)
        monkeypatch.setattr(io, "open", lambda *a, **k: self.file(opened(*a, **k)))
        monkeypatch.setattr(builtins, "open", io.open)
        save_file = self.wrapped(safetensors.save_file)
        monkeypatch.setattr(safetensors, "save_file", lambda tensors, part, metadata: save_file(tensors, part, metadata=metadata))

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return call(*args, **kwargs)

        return counted

    def file(self, file: Any) -> Any:
        if not file.writable():
            return file
        outer = self

        class File:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, data: Any) -> int:
                outer.tick()
                return file.write(data)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        return File()


@pytest.mark.filterwarnings("ignore:.*is not the configuration inside")
@kinds
def test_every_failing_call_leaves_the_older_file_and_nothing_else(kind: str, tmp_path: Path) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "x"
    write(path, 1)
    before = tree(tmp_path)
    n = 0
    for n in range(1, 200):
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing = Failing(monkeypatch)
            failing.left = n
            try:
                write(path, 2)
                break
            except OSError as error:
                raised = error
        assert str(path) in str(raised) and "No space left on device" in str(raised), n
        assert tree(tmp_path) == before, n
        if kind == "stack":  # many names: from the first rename on a stack is neither, and says so
            try:
                assert read(path) in (1, 2)
            except ValueError as error:
                if "must hold one save, got members of several" not in str(error):
                    raise
        else:
            assert read(path) in (1, 2), n
        write(path, 1)
    assert n > 4, "nothing was made to fail"
    assert read(path) == 2


@contextmanager
def limited(size: int) -> Generator[None, None, None]:
    """Files cannot grow beyond a size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@kinds
def test_a_full_disk_is_named_with_the_path(kind: str, tmp_path: Path) -> None:
    write, read = KINDS[kind]
    path = tmp_path / "x"
    write(path, 1)
    before, size = tree(tmp_path), max(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    for limit in range(0, max(size - 40, 1), size // 9 + 1):  # checksums have more or fewer digits
        with limited(limit), pytest.raises(OSError, match=r"File too large|os error 27") as raised:
            write(path, 2)
        assert str(path) in str(raised.value)
        assert (tree(tmp_path), read(path)) == (before, 1)


def child(code: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS), str(TESTS / "interop")]),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=900 if DEEP else 90)


@pytest.mark.parametrize("kind", ["save", "checkpoint", "counter"])
def test_every_failing_allocation_leaves_the_older_file(kind: str, tmp_path: Path) -> None:
    memory = pytest.importorskip("_testcapi", reason="this Python is built without its own tests")
    write, read = KINDS[kind]
    path, raised, replace_all = tmp_path / "x", [], files.replace_all
    write(path, 1)
    before = tree(tmp_path)
    for n in range(1, 3000, 1 if DEEP else 131):

        def failing(contents: Any, n: int = n) -> None:
            memory.set_nomemory(n, n + 1)  # from here on: torch itself does not survive it everywhere
            try:
                replace_all(contents)
            finally:
                memory.remove_mem_hooks()

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(files, "replace_all", failing)
            try:
                write(path, 2)
            except (MemoryError, OSError) as error:
                raised.append(str(error))
        assert tree(tmp_path) == before, n
        assert read(path) in (1, 2), n
        write(path, 1)
    assert raised and all(str(path) in message for message in raised)


# ---------------------------------------------------------------- several processes

TOGETHER = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    import test_files
    folder, wanted, kinds = Path(sys.argv[1]), int(sys.argv[2]), test_files.KINDS
    torch.set_num_threads(1)
    os.fsync = lambda handle: None
    names = ["save", "saelens", "dictionary_learning", "checkpoint", "counter", "text"]
    for name in names:
        kinds[name][0](folder / name, 1)

    def writing(seed):
        rng = random.Random(seed)
        while True:
            for name in names:
                kinds[name][0](folder / name, rng.randrange(1, 200))

    def start(seed):
        pid = os.fork()
        if pid == 0:
            writing(seed)
        return pid

    writers, rng, reads, kills = [start(seed) for seed in range(3)], random.Random(0), 0, 0
    kill = time.monotonic()
    try:
        while reads < wanted or kills < wanted / 10:
            for name in names:
                assert 1 <= kinds[name][1](folder / name) < 200
                reads += 1
            if time.monotonic() > kill:  # somewhere inside a write, likely
                os.kill(writers[0], signal.SIGKILL)
                os.waitpid(writers.pop(0), 0)
                writers.append(start(100 + kills))
                kill, kills = time.monotonic() + rng.uniform(0.05, 0.2), kills + 1
    finally:
        for pid in writers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    for name in names:
        kinds[name][1](folder / name)
        kinds[name][0](folder / name, 7)
        assert kinds[name][1](folder / name) == 7
    hidden = list(folder.rglob(".*"))  # of the killed ones: ours, safetensors' (.tmp)
    assert len(hidden) <= 3 * (kills + 3), hidden
"""


@pytest.mark.slow
def test_several_writers_some_killed_and_a_reader(tmp_path: Path) -> None:
    done = child(TOGETHER, tmp_path, 3000 if DEEP else 40)
    assert done.returncode == 0, done.stderr


def test_read_only_folders_and_permissions() -> None:
    place = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    folder, mine = place / "locked", place / "mine"
    for each in (folder, mine):
        each.mkdir()
        for name, (write, read) in KINDS.items():
            write(each / name, 1)
            assert read(each / name) == 1  # also so that all modules are there: another user may not read them
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in (*mine.rglob("*"), mine):
        path.chmod(0o777)
    place.chmod(0o777)
    umask, user = os.umask(0o027), os.geteuid()
    try:
        if user == 0:  # to whom nothing is forbidden
            os.seteuid(65534)
        for name, (write, read) in KINDS.items():
            with pytest.raises(PermissionError, match=str(folder / name)):
                write(folder / name, 2)
            assert read(folder / name) == 1
            write(mine / name, 2)
            assert read(mine / name) == 2
    finally:
        os.seteuid(user)
        os.umask(umask)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777)
        written = {oct(stat.S_IMODE(path.stat().st_mode)) for path in mine.rglob("*") if path.is_file()}
        shutil.rmtree(place)
    assert written == {"0o640"}


@kinds
def test_links_are_replaced_and_not_followed(kind: str, tmp_path: Path) -> None:
    write, read = KINDS[kind]
    (tmp_path / "out").mkdir()
    path, victim = tmp_path / "out" / "x", tmp_path / "victim"
    write(path, 1)
    victim.write_bytes(b"untouched")
    for file in [p for p in (tmp_path / "out").rglob("*") if p.is_file()]:
        file.unlink()
        file.symlink_to(victim)
        file.with_name(file.name + ".part").symlink_to(victim)  # where it was written until 2026-11
    write(path, 2)
    assert victim.read_bytes() == b"untouched"
    assert read(path) == 2
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_symlink() and not p.name.endswith(".part")]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe"):
        save_checkpoint(tmp_path / "pipe", full(1))
    (tmp_path / "folder" / "sae.safetensors").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"sae\.safetensors"):
        full(1).save(tmp_path / "folder")
    assert tree(tmp_path) == ["folder", "folder/sae.safetensors", "pipe"]


def test_a_smaller_stack_over_a_larger_one_and_a_mixture(tmp_path: Path) -> None:
    SAEs([full(n) for n in (1, 2, 3)]).save(tmp_path / "s")
    SAEs([full(n) for n in (4, 5)]).save(tmp_path / "s")
    stack = SAEs.load(tmp_path / "s")
    assert [value_of(member) for member in stack] == [4, 5] and not stack.training
    SAEs([full(n) for n in (6, 7)]).save(tmp_path / "t")
    shutil.copytree(tmp_path / "t" / "1", tmp_path / "s" / "1", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"^SAEs.load: .*s must hold one save, got members of several"):
        SAEs.load(tmp_path / "s")
    shutil.rmtree(tmp_path / "t" / "1")
    with pytest.raises(ValueError, match="must hold 2 members, got 1"):
        SAEs.load(tmp_path / "t")


# ---------------------------------------------------------------- files of before


def files_of(commit: str, folder: Path) -> dict[str, Tensor]:
    """Written by ``save``, ``save_checkpoint`` and ``CodeCounter.save`` of a commit: their reconstructions are those that it computed."""
    with zipfile.ZipFile(TESTS / "interop" / f"files_of_{commit}.zip") as archive:
        archive.extractall(folder)
    expected = safetensors.load_file(folder / "expected.safetensors")
    x = expected["x"]
    stacks: dict[str, Any] = {"stack": SAEs.load(folder / "stack"), "stack.pt": load_checkpoint(folder / "stack.pt").sae.eval()}
    for name in set(expected) - {"x", "resumed"}:
        stem, _, member = name.partition("/")
        if member:
            sae = stacks[stem][int(member)]
        else:
            sae = load_checkpoint(folder / name).sae.eval() if name.endswith(".pt") else SAE.from_pretrained(folder / name)
        torch.testing.assert_close(sae(x).x_hat, expected[name], rtol=1e-5, atol=1e-6)
    sae = load_checkpoint(folder / "torch.pt").sae
    load_checkpoint(folder / "torch.pt", sae, torch.optim.Adam(sae.parameters()))
    return expected


def test_files_of_65f2b88_load(tmp_path: Path) -> None:
    files_of("65f2b88", tmp_path)
    sae = load_checkpoint(tmp_path / "topk.pt").sae
    opt = optim.Adam(sae)
    assert load_checkpoint(tmp_path / "topk.pt", sae, opt).extra["step"] == opt.steps == 3
    assert [(row.seen, row.distinct) for row in CodeCounter.load(tmp_path / "counter.npz").table()] == [(20, 7), (20, 3)]


def test_files_of_5eccb99_load(tmp_path: Path) -> None:
    """Of the last commit before modules moved; a run of its ``Trainer`` goes on to the parameters that it had three steps later."""
    expected = files_of("5eccb99", tmp_path)
    sae = load_checkpoint(tmp_path / "signum.pt").sae
    opt = optim.Signum(sae)
    assert load_checkpoint(tmp_path / "signum.pt", sae, opt).extra["step"] == opt.steps == 2
    sae, x = SAE(D, 8, TopK(2), dead_after=50), expected["x"]
    adam = optim.Adam(sae, schedule=optim.warmup_linear_decay(2, 5, 10))
    Trainer(sae, adam, checkpoint=tmp_path / "trainer.pt", progress=False).fit(Batches(x, size=8), 8, resume=True)
    torch.testing.assert_close(sae.eval()(x).x_hat, expected["resumed"], rtol=1e-5, atol=1e-6)
    assert [(row.seen, row.distinct) for row in CodeCounter.load(tmp_path / "counter.npz").table()] == [(40, 9)]
    for file in tmp_path.rglob("*.pt"):  # classes of this library would bind files to the places of its modules
        with zipfile.ZipFile(file) as archive:
            assert all(b"fastsae" not in archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


# ---------------------------------------------------------------- damage


def content(kind: str, path: Path) -> Any:
    if kind == "counter":
        return CodeCounter.load(path).table()
    sae, extra = load_checkpoint(path) if kind == "checkpoint" else (SAE.from_pretrained(path), {})
    return sae.config(), {name: tensor.tolist() for name, tensor in sae.state_dict().items()}, extra


@pytest.mark.filterwarnings("ignore:.*is not the configuration inside")
@pytest.mark.parametrize("kind", ["save", "saelens", "sparsify", "dictionary_learning", "checkpoint", "counter"])
def test_no_flipped_bit_is_taken(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    KINDS[kind][0](path, 3)
    right = content(kind, path)
    file = next(p for p in path.iterdir() if p.suffix != ".json") if path.is_dir() else path
    raw, rng, refused = file.read_bytes(), random.Random(0), 0
    trials = rng.sample(range(8 * len(raw)), min(8 * len(raw), 20_000 if DEEP else 100))
    for bit in trials:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            assert content(kind, path) == right, f"bit {bit} is taken for something else"  # padding, times of archives
        except ValueError:
            refused += 1
    assert refused > len(trials) / 4


def test_checksums_do_not_depend_on_torch_s_setting(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint(tmp_path / "x.pt", 3)
        assert torch.serialization.get_crc32_options() is False
        torch.save({"W_dec": rows()}, tmp_path / "w.pt")  # of others: cannot be compared, and is read
        assert torch.equal(read_tensors(tmp_path / "w.pt")["W_dec"], rows())
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None


# ---------------------------------------------------------------- sizes that lie


def deflated(path: Path) -> None:
    """The same archive, compressed."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members.items():
            new.writestr(name, data)


def test_bombs_are_refused_by_their_sizes(tmp_path: Path) -> None:
    zeros = np.zeros(1 << 21, np.int64)
    paths = []
    for name, make, read in (
        ("x.npz", lambda p: np.savez_compressed(p, W_dec=zeros.view(np.float64).reshape(1024, -1)), read_tensors),
        ("c.npz", lambda p: np.savez_compressed(p, about=np.array("x"), data=zeros), CodeCounter.load),
        ("x.pt", lambda p: (torch.save({"W_dec": torch.from_numpy(zeros).double()}, p), deflated(p)), read_tensors),
        ("c.pt", lambda p: (save_checkpoint(p, full(1), None, {"a": torch.from_numpy(zeros)}), deflated(p)), load_checkpoint),
    ):
        path = tmp_path / name
        make(path)
        assert path.stat().st_size < 1 << 17
        with pytest.raises(ValueError, match=rf"{name}.*(members claim \d+ bytes, the file has|is compressed)"):
            read(path)
        paths.append(path)
    # Mild compression of numbers is none; a member twice, or two members on the same bytes, is.
    np.savez_compressed(tmp_path / "mild.npz", W_dec=rows().numpy())
    assert torch.equal(read_tensors(tmp_path / "mild.npz")["W_dec"], rows())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "mild.npz", "a") as archive:
        archive.writestr("W_dec.npy", b"")
    with pytest.raises(ValueError, match=r"mild.npz .*ambiguous"):
        read_tensors(tmp_path / "mild.npz")


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("strides", [(0, 0), (1, 0), (1, 1), (2, 1)])
def test_overlapping_tensors_claim_more_than_they_hold(strides: tuple[int, int], tmp_path: Path) -> None:
    many = torch.zeros(3000).as_strided((1000, 1000), strides)
    torch.save({"W_dec": many}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"W_dec claims the shape \[1000, 1000\] of torch.float32 but holds"):
        read_tensors(tmp_path / "x.pt")
    sae = full(1)
    save_checkpoint(tmp_path / "c.pt", sae, optim.Adam(sae))
    whole = torch.load(tmp_path / "c.pt", weights_only=True)
    loop: list[Any] = [many]
    loop.append(loop)  # a container that holds itself
    for place in ("extra", "opt", "sae"):
        torch.save({**whole, place: {**whole[place], "W_dec": loop if place == "extra" else many}}, tmp_path / "c.pt")
        with pytest.raises(ValueError, match=r"W_dec claims the shape \[1000, 1000\]"):
            load_checkpoint(tmp_path / "c.pt")


def test_claims_of_counters_and_calls_in_pickles(tmp_path: Path) -> None:
    state = counted(4).__getstate__()
    for name, value in (
        ("about", np.array(json.dumps({**json.loads(str(state["about"])), "layers": 10**9}))),
        ("about", np.frombuffer(b"\xff\xff\xff\x7f" * 4, "<U4")[0:1].reshape(())),
        ("seen", np.array([2.5])),
    ):
        np.savez(tmp_path / "c.npz", **{**state, name: value})
        with pytest.raises(ValueError, match=r"CodeCounter.load: .*c.npz is damaged or not a saved CodeCounter"):
            CodeCounter.load(tmp_path / "c.npz")
    torch.save({"W_dec": Call(torch.Tensor, 3, 2**40)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt"):
        read_tensors(tmp_path / "x.pt")
    torch.save({"W_dec": rows()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)  # has neither sizes nor checksums
    with pytest.raises(ValueError, match=r"old.pt is not a file of tensors"):
        read_tensors(tmp_path / "old.pt")


# ---------------------------------------------------------------- fuzzing


def test_fuzzed_files_are_refused_or_compute() -> None:
    counts = fuzz_files.run(1.0, 0, plain=True)
    assert counts["taken"] > 3 < counts["refused"]
