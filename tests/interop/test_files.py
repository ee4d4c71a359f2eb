"""Files under faults: every failing call, full disks, killed processes, several writers, flipped bits, sizes that lie, other models."""

from __future__ import annotations

import builtins
import copy
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fuzz_files
import numpy as np
import pytest
import torch
from places import ROOT, TESTS
from torch import Tensor

from fastsae import SAE, AuxK, BatchTopK, Gated, JumpReLU, ReLU, SAEs, TopK, load_checkpoint, optim, save_checkpoint
from fastsae._core import files
from fastsae.codes import CodeCounter
from fastsae.formats.weight_files import read_tensors
from fastsae.trainer import Batches, Trainer

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
D, F = 4, 12


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # is called, which the counting tests see; no power fails here


def rows(n: int = 40, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n + d))


def full(value: int, **options: Any) -> SAE:
    """A module whose weights and configuration say which one it is."""
    sae = SAE(D, F, TopK(3), seed=0, dead_after=value + 1, normalise_decoder=False, **options)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.fill_(value)
    return sae


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


def checkpoint(path: Path, value: int) -> None:
    sae = full(value)
    save_checkpoint(path, sae, optim.Adam(sae), {"n": value})


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


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


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
def limited(size: int) -> Iterator[None]:
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
    stacks = {"stack": SAEs.load(folder / "stack"), "stack.pt": load_checkpoint(folder / "stack.pt").sae.eval()}
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


# ---------------------------------------------------------------- checkpoints of another model

BASE: dict[str, Any] = {"d_in": D, "d_sae": F, "activation": TopK(3)}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # (of the file, of the module)
    "pre_bias": ({}, {"pre_bias": False}),
    "tied": ({"tied": True}, {}),
    "untied": ({}, {"tied": True}),
    "prefixes": ({}, {"prefixes": [4, F]}),
    "other prefixes": ({"prefixes": [5, F]}, {"prefixes": [4, F]}),
    "objective": ({}, {"objective": "fvu"}),
    "dtype": ({}, {"dtype": torch.bfloat16}),
    "wider": ({"dtype": torch.float64}, {}),
    "d_in": ({"d_in": D + 1}, {}),
    "d_sae": ({}, {"d_sae": F + 1}),
    "relu": ({"activation": TopK(3, relu=False)}, {}),
    "activation": ({"activation": ReLU()}, {}),
    "to gated": ({}, {"activation": Gated()}),
    "transcoder": ({"d_out": D}, {}),
    "skip": ({"d_out": D, "skip": True}, {"d_out": D}),
    "normalise_decoder": ({}, {"normalise_decoder": False}),
}


def state_of(*parts: Any) -> str:
    return repr([(type(part).__name__, None if part is None else copy.deepcopy(part.state_dict())) for part in parts])


def made(options: dict[str, Any], seed: int) -> SAE:
    return SAE(**{**BASE, **options}, seed=seed)


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_model_changes_nothing(name: str, tmp_path: Path) -> None:
    held, ours = (made(options, seed) for seed, options in enumerate(OTHERS[name]))
    path = save_checkpoint(tmp_path / "x.pt", held)
    before = state_of(ours)
    with pytest.raises(ValueError, match=r"^load_checkpoint: .*x.pt is damaged or of something else: it holds "):
        load_checkpoint(path, ours)
    assert state_of(ours) == before
    with pytest.raises(ValueError, match="it holds"):
        load_checkpoint(path, SAEs([ours]))
    save_checkpoint(path, SAEs([made({}, 0), made({}, 1)]))
    with pytest.raises(ValueError, match="it holds 2 dictionaries, the module is SAE"):
        load_checkpoint(path, ours)


def test_what_a_module_keeps_of_its_own(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "x.pt", made({"l1": 0.1, "dead_after": 5, "aux": AuxK(3), "activation": TopK(5)}, 0))
    sae = load_checkpoint(path, made({"l1": 0.2}, 1)).sae
    assert (sae.l1, sae.dead_after, sae.aux, sae.k) == (0.2, 10_000_000, None, 5)
    assert torch.equal(sae.W_enc, made({}, 0).W_enc)


def stepped(opt: Any, sae: SAE) -> Any:
    sae.loss(rows()).loss.backward()
    opt.step()
    return opt


def adam(sae: SAE, order: int = 1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(list(sae.parameters())[::order], **options)


def groups(sae: SAE) -> torch.optim.Optimizer:
    parameters = list(sae.parameters())
    return torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:]}])


WRONG: dict[str, tuple[Callable[[SAE], Any], Callable[[SAE], Any], str]] = {  # (of the file, ours, message)
    "none": (lambda sae: None, adam, "holds no optimiser's state"),
    "fused for torch's": (lambda sae: optim.Adam(sae), adam, "does not fit Adam: KeyError"),
    "torch's for fused": (lambda sae: stepped(adam(sae), sae), optim.Adam, "not a state of fastsae.optim.Adam"),
    "adam for sgd": (lambda sae: stepped(adam(sae), sae), lambda sae: torch.optim.SGD(sae.parameters()), "does not fit SGD: it is of Adam"),
    "sgd for adam": (lambda sae: torch.optim.SGD(sae.parameters()), adam, "does not fit Adam: it is of SGD"),
    "another order": (lambda sae: stepped(adam(sae, -1), sae), adam, r"it steps \[\['b_dec', 'W_dec', 'b_enc', 'W_enc'\]\]"),
    "groups": (lambda sae: stepped(groups(sae), sae), adam, "it has 2 groups of parameters, the optimiser 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_optimiser_of_something_else_changes_nothing(name: str, tmp_path: Path) -> None:
    held, ours = made({}, 0), made({}, 1)
    of_file, of_ours, message = WRONG[name]
    path = save_checkpoint(tmp_path / "x.pt", held, of_file(held), {"step": 1, "rng": torch.get_rng_state()})
    opt = of_ours(ours)
    if isinstance(opt, torch.optim.Optimizer):
        stepped(opt, ours)
    else:
        opt.step(rows())
    batches = Batches(rows(), size=8)
    before = state_of(ours, opt, batches)
    for load in (lambda: load_checkpoint(path, ours, opt), lambda: Trainer(ours, opt, progress=False).load(path, batches)):
        with pytest.raises(ValueError, match=rf"^load_checkpoint: .*x.pt is damaged or of something else: .*{message}"):
            load()
        assert state_of(ours, opt, batches) == before


@pytest.mark.parametrize("name", ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"])
def test_every_optimiser_of_torch_goes_on(name: str, tmp_path: Path) -> None:
    """Also one whose state of a matrix is another than that of a vector."""
    ours, other = made({}, 0), made({}, 1)
    opts = [getattr(torch.optim, name)(sae.parameters(), lr=1e-3) for sae in (ours, other)]
    load_checkpoint(save_checkpoint(tmp_path / "x.pt", ours, stepped(opts[0], ours)), other, opts[1])
    for sae, opt in zip((ours, other), opts):
        opt.zero_grad()
        stepped(opt, sae)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters()))


class Larger(SAE):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.gain = torch.nn.Parameter(torch.ones(3))


def test_a_module_with_more_parameters_changes_nothing(tmp_path: Path) -> None:
    held, ours = made({}, 0), Larger(**BASE, seed=1)
    path = save_checkpoint(tmp_path / "x.pt", held, optim.Adam([("W_dec", held.W_dec)], lr=0.5), {"step": 1, "rng": torch.get_rng_state()})
    opt, batches = optim.Adam([("W_dec", ours.W_dec)]), Batches(rows(), size=8)
    before = state_of(ours, opt, batches)
    for load in (lambda: load_checkpoint(path, ours, opt), lambda: Trainer(ours, opt, progress=False).load(path, batches)):
        with pytest.raises(ValueError, match="it has no 'gain', which the module has"):
            load()
        assert state_of(ours, opt, batches) == before
    with pytest.raises(TypeError, match="load_checkpoint: sae must be an SAE or SAEs, got Linear"):
        load_checkpoint(path, torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def test_a_damaged_optimiser_s_state_changes_nothing(tmp_path: Path) -> None:
    """Each value in turn replaced by another type, size or range."""
    for make in (optim.Adam, adam, *([optim.Signum] if DEEP else [])):
        sae = made({}, 0)
        opt = make(sae)
        opt.step(rows()) if not isinstance(opt, torch.optim.Optimizer) else stepped(opt, sae)
        path = save_checkpoint(tmp_path / "x.pt", sae, opt)
        whole = torch.load(path, weights_only=True)
        load_checkpoint(path, sae, opt)
        before = state_of(sae, opt)
        for change in changes(whole["opt"]):
            torch.save({**whole, "opt": change}, path)
            try:
                load_checkpoint(path, sae, opt)
            except ValueError:
                assert state_of(sae, opt) == before
                continue
            if make is not adam:  # torch's takes what it likes, but for sizes
                opt.step(rows())  # pyright: ignore[reportArgumentType, reportCallIssue]
            sae.load_state_dict(whole["sae"])
            opt.load_state_dict(whole["opt"])


def changes(value: Any, name: str = "") -> Iterator[Any]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield {other: kept for other, kept in value.items() if other != key}
            for change in changes(item, key):
                yield {**value, key: change}
    elif isinstance(value, Tensor):
        if value.dim():
            yield from (value[:-1], value.unsqueeze(0), value.bool(), "tensor", None)
    elif name in ("lr", "eps", "steps", "momentum", "betas"):
        yield from ("text", [value] * 7, {"a": 1}, -3.0)


def test_a_damaged_state_changes_nothing(tmp_path: Path) -> None:
    for options in ({}, {"activation": BatchTopK(3)}, {"activation": JumpReLU(0.1, bandwidth=0.1)}):
        sae = made(options, 1)
        path = save_checkpoint(tmp_path / "x.pt", made(options, 0))
        whole = torch.load(path, weights_only=True)
        before = state_of(sae)
        for name, tensor in whole["sae"].items():
            wrong: list[Any] = [None, "text", tensor.reshape(-1)[:0], tensor.unsqueeze(0), tensor.to("meta")]
            wrong += [tensor.to(torch.int8)] if tensor.is_floating_point() else [tensor.float()]
            wrong += [tensor.to_sparse()] if tensor.dim() else []
            wrong += [-tensor - 1] if name in ("scale", "silent") else []
            wrong += [torch.full_like(tensor, float("nan"))] if name in ("scale", "running_threshold") else []
            states = [{**whole["sae"], name: value} for value in wrong] + [{**whole["sae"], name + "2": tensor}]
            if name not in ("scale", "silent"):  # which the earliest files do not have
                states.append({other: kept for other, kept in whole["sae"].items() if other != name})
            for state in states:
                torch.save({**whole, "sae": state}, path)
                for module in (sae, None):
                    with pytest.raises(ValueError, match=r"^load_checkpoint: .*x.pt (is damaged or of something else|: )"):
                        load_checkpoint(path, module)
                assert state_of(sae) == before
        for key, value in (("format", 2), ("extra", [1]), ("config", {}), ("config", None), ("sae", None)):
            torch.save({**whole, key: value}, path)
            with pytest.raises(ValueError, match=r"^load_checkpoint: .*x.pt is damaged or of something else"):
                load_checkpoint(path, sae)
        assert state_of(sae) == before


def test_buffers_that_the_earliest_files_do_not_have(tmp_path: Path, poisoned_memory: None) -> None:
    path = save_checkpoint(tmp_path / "x.pt", made({}, 0))
    whole = torch.load(path, weights_only=True)
    torch.save({**whole, "sae": {name: tensor for name, tensor in whole["sae"].items() if name not in ("silent", "scale")}}, path)
    sae = load_checkpoint(path).sae
    assert not bool(sae.silent.any()) and bool((sae.scale == 1).all())
    assert torch.equal(sae.eval()(rows()).x_hat, made({}, 0).eval()(rows()).x_hat)


def test_a_trainer_that_cannot_go_on_is_what_it_was(tmp_path: Path) -> None:
    sae = made({}, 0)
    good = {"step": 3, "rng": torch.get_rng_state(), "data": Batches(rows(), size=8).state_dict()}
    for extra in (
        {"step": "three"},
        {"step": -1},
        {"rng": torch.zeros(3, dtype=torch.uint8)},
        {"rng": 5},
        {"data": {**good["data"], "size": 9}},
        {"data": {**good["data"], "position": "x"}},
        {"data": {}},
        {"data": [1]},
        {"skipped": -1},
    ):
        path = save_checkpoint(tmp_path / "x.pt", sae, stepped(adam(sae), sae), {**good, **extra})
        ours = made({}, 1)
        trainer, batches = Trainer(ours, adam(ours), progress=False), Batches(rows(), size=8)
        before, random_state = state_of(ours, trainer.opt, batches), torch.get_rng_state()
        with pytest.raises(TypeError if "'x'" in str(extra) else ValueError):
            trainer.load(path, batches)
        assert (state_of(ours, trainer.opt, batches), trainer.step) == (before, 0)
        assert torch.equal(torch.get_rng_state(), random_state)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    from collections import defaultdict, namedtuple

    point = namedtuple("point", "x")
    quantised = torch.zeros(2, device="meta")
    for extra in ({"a": defaultdict(int)}, {"a": point(1)}, {"a": {(1, 2): 3}}, {"a": np.zeros(1)}, {"a": quantised}, {"a": {1}}):
        with pytest.raises(TypeError, match=r"^save_checkpoint: (keys of )?extra.a must be"):
            save_checkpoint(tmp_path / "x.pt", full(1), None, extra)
    assert tree(tmp_path) == []


def test_numbers_of_numpy_are_written_as_pythons(tmp_path: Path) -> None:
    """A schedule of NumPy's cosine, an annealed penalty, an option set by hand: none ends a run at its first checkpoint."""
    sae = made({"activation": ReLU()}, 0)
    sae.dead_after = np.int64(7)  # pyright: ignore[reportAttributeAccessIssue]
    run = Trainer(
        sae,
        adam(sae, lr=np.float64(1e-3)),
        schedule=lambda step: 0.5 * (1 + np.cos(step / 9)),
        anneal={"l1": lambda step: np.float32(step / 4)},  # pyright: ignore[reportArgumentType]
        checkpoint=tmp_path / "x.pt",
        progress=False,
    )
    run.fit([rows()] * 3)
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.sae.l1, checkpoint.sae.dead_after) == (0.5, 7)
    lr = torch.load(tmp_path / "x.pt", weights_only=True)["opt"]["param_groups"][0]["lr"]
    assert type(lr) is float and lr == run.opt.param_groups[0]["lr"]
    assert SAE.load(sae.save(tmp_path / "folder")).l1 == 0.5
    again = save_checkpoint(tmp_path / "y.pt", sae, None, {"a": [np.float32(0.5), (np.int64(2), np.bool_(True))]})
    assert load_checkpoint(again).extra == {"a": [0.5, (2, True)]}


# ---------------------------------------------------------------- fuzzing


def test_fuzzed_files_are_refused_or_compute() -> None:
    counts = fuzz_files.run(1.0, 0, plain=True)
    assert counts["taken"] > 3 < counts["refused"]
