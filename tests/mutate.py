"""Runs the mutants of tests/mutants.py: each is applied in a copy, what depends on it is compiled, and its test must fail.

    python tests/mutate.py [--only TEXT] [--jobs N]

The copy is build/mutants/<job>, compiled with -O1 for the portable level, avx512 and the highest. Objects are kept by the contents of what
they include, so that a mutant costs the few files that see it. Prints a line a mutant; exits with 1 where one survives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS, Mutant
from places import ROOT

HOME = ROOT / "build" / "mutants"
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
AVX512 = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"portable": [], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"]}
SCREENS = {"cpu/engine/lanes.isa.h", "cpu/engine/tile.isa.h", "cpu/engine/topk.isa.h"}  # included where screened only
NO_SCREEN = {"adam", "decode", "hamming", "signs"}  # have no body of their own at the highest level

# Most of a short test's time is importing torch: once for all. Triton must find TRITON_INTERPRET set when it is imported.
FORK, SPAWN = multiprocessing.get_context("forkserver"), multiprocessing.get_context("spawn")
FORK.set_forkserver_preload(["torch", "pytest", "hypothesis", "triton"])


def includes(root: Path, source: Path, screens: bool, seen: set[Path]) -> set[Path]:
    """`source` and the files under csrc that it includes."""
    if source in seen:
        return seen
    seen.add(source)
    for name in re.findall(r'^\s*#\s*include "([^"]+)"', source.read_text(), re.MULTILINE):
        if (root / "csrc" / name).exists() and (screens or name not in SCREENS):
            includes(root, root / "csrc" / name, screens, seen)
    return seen


def compiled(root: Path, source: Path, level: str | None) -> Path:
    import pybind11

    screens = level in ("avx512", "avx512_bf16")
    command = [os.environ.get("CXX", "g++"), *FLAGS, f"-I{root / 'csrc'}"]
    if level is None:
        command += [f"-DFASTSAE_BUILT_{name}=1" for name in LEVELS]
        if source.name == "bind.cpp":
            command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    else:
        command += ["-fno-exceptions", *LEVELS[level], f"-DFASTSAE_ISA={level}", f"-DFASTSAE_LEVEL_{level}=1"]
    told = [part.replace(str(root), "") for part in command]
    text = b"".join(path.read_bytes() for path in sorted(includes(root, source, screens, set())))
    target = HOME / "objects" / (hashlib.sha256(json.dumps([str(source.relative_to(root)), told]).encode() + text).hexdigest()[:32] + ".o")
    if not target.exists():
        made = root / f"{target.name}.part"
        subprocess.run([*command, "-c", str(source), "-o", str(made)], check=True, capture_output=True)
        made.replace(target)
    return target


def sees(root: Path, mutant: Mutant, source: Path, level: str | None) -> bool:
    """Whether a mutant's object differs: of kernels at one level, of the one file that is enough for its test where it names one."""
    if level is not None and level != ("avx512" if source.name.split(".")[0] in NO_SCREEN else "avx512_bf16"):
        return False
    return (not mutant.sees or source == root / mutant.sees) and root / mutant.path in includes(root, source, True, set())


clean: dict[tuple[str, str | None], Path] = {}  # objects without a mutant


def build(root: Path, mutant: Mutant | None = None) -> None:
    objects = []
    for source in sorted((root / "csrc").rglob("*.cpp")):
        if {"test", "cuda"} & set(source.relative_to(root / "csrc").parts):
            continue
        for level in LEVELS if source.name.endswith(".isa.cpp") else (None,):
            key = str(source.relative_to(root)), level
            if key not in clean:
                clean[key] = compiled(root, source, level)
            objects.append(compiled(root, source, level) if mutant and sees(root, mutant, source, level) else clean[key])
    library = root / "fastsae" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.unlink(missing_ok=True)
    subprocess.run([os.environ.get("CXX", "g++"), "-shared", *map(str, objects), "-ldl", "-o", str(library)], check=True)


def prepare(job: int) -> Path:
    """A copy of what tests need, built."""
    root = HOME / str(job)
    shutil.rmtree(root, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in ("csrc", "fastsae", "kernels", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "fastsae" / "kernels").symlink_to(root / "kernels")
    (HOME / "objects").mkdir(parents=True, exist_ok=True)
    build(root)
    return root


def run_tests(root: Path, names: list[str], interpreted: bool, said: Path) -> None:
    """In a process of its own, which has what tests import but not fastsae."""
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "HYPOTHESIS_PROFILE": "ci", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(root)}
    os.environ.pop("FASTSAE_ISA", None)
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # In the folder of tests: with the copy's root first on the path, other libraries would take our kernels/ for theirs.
    os.chdir(root / "tests")
    # `root` stands before what an editable install adds; its parent folder's tests are not there.
    sys.path[:] = [str(root / "tests"), str(root), *(p for p in sys.path if p not in ("", str(ROOT / "tests"), str(ROOT)))]
    import pytest

    import fastsae

    if not str(fastsae.__file__).startswith(str(root)):
        sys.exit(2)
    sys.exit(10 + pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-c", str(root / "pyproject.toml"), "--rootdir", str(root), *names]))


def passes(root: Path, *tests: str) -> bool:
    """Whether these tests pass, all of them in the interpreter or none."""
    interpreted = tests[0].startswith("interpreted ")
    names, said = [str(root / test.removeprefix("interpreted ")) for test in tests], root / "said.txt"
    process = (SPAWN if interpreted else FORK).Process(target=run_tests, args=(root, names, interpreted, said))
    process.start()
    process.join(600)
    if process.is_alive():  # it waits for ever: seen
        process.kill()
        process.join()
        return False
    if process.exitcode is None or (process.exitcode >= 0 and process.exitcode not in (10, 11)):  # a signal is a crash: seen
        raise RuntimeError(f"{tests}: exit {process.exitcode}")
    return process.exitcode == 10


def survives(root: Path, mutant: Mutant) -> bool:
    file = root / mutant.path
    before = file.read_text()
    assert before.count(mutant.old) == 1
    file.write_text(before.replace(mutant.old, mutant.new))
    try:
        build(root, mutant)
        return passes(root, mutant.test)
    finally:
        file.write_text(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose file, texts or test contain this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if m.test and options.only in " ".join(m)]
    roots: queue.Queue[Path] = queue.Queue()
    first = prepare(0)  # the others find its objects
    roots.put(first)
    for job in range(1, min(options.jobs, len(chosen))):
        roots.put(prepare(job))
    for interpreted in (False, True):
        tests = sorted({m.test for m in chosen if m.test.startswith("interpreted ") is interpreted})
        if tests and not passes(first, *tests):
            raise SystemExit(f"without a mutant one of these fails: {tests}")

    def run(mutant: Mutant) -> bool:
        root = roots.get()
        try:
            alive = survives(root, mutant)
        except subprocess.CalledProcessError as error:  # a mutant that does not compile tests nothing
            print((error.stderr or b"").decode()[:2000])
            alive = True
        finally:
            roots.put(root)
        print(f"{'SURVIVED' if alive else 'killed'}  {mutant.path}: {mutant.old!r} -> {mutant.new!r}  ({mutant.test})", flush=True)
        return alive

    with ThreadPoolExecutor(options.jobs) as pool:
        alive = sum(pool.map(run, chosen))
    print(f"{len(chosen) - alive} of {len(chosen)} killed; {sum(bool(m.slack) for m in MUTANTS)} listed as slack")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
