"""``fastsae bench``: lists the benches, runs them, says how long it will take while it does, and keeps what they find."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import report

if TYPE_CHECKING:
    from bench.session import Session


def run(options: argparse.Namespace, root: Path, machine: dict[str, Any]) -> int:
    """Exit code of ``fastsae bench``: 0, 1 where a row failed; ValueError, ImportError where nothing can be run."""
    out = (options.out or root / "bench" / "results").resolve()
    if not options.list:
        out.mkdir(parents=True, exist_ok=True)  # a file of that name is said now, not after the first row
    if options.device != "cpu" and not options.ops:
        from bench.gpu import table

        return table.listed() if options.list else table.command(out, minutes=options.minutes, quick=options.quick)
    known = sorted(path.stem.removeprefix("bench_") for path in (root / "bench").glob("bench_*.py"))
    if unknown := [op for op in options.ops if op not in known]:
        raise ValueError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    if find_spec("pytest_benchmark") is None:
        raise ImportError("it needs pytest-benchmark: pip install 'fastsae-kernels[bench]'")
    if options.device != "cpu" and not options.list and not torch.cuda.is_available():
        raise ValueError("no CUDA device (torch.cuda.is_available() is False)")
    more = (*options.ops, *([options.rows] if options.rows else []))
    kept = report.Report.begin(out, machine, options.device, quick=options.quick, more=more)
    session, code = rows(kept, [root / "bench" / f"bench_{op}.py" for op in options.ops or known], options)
    if options.list:
        print("\n".join(session.table()))
        return code
    if session.left_out:
        print(f"\nleft out, {options.minutes:g} minutes were allowed: {', '.join(session.left_out)}", file=sys.stderr)
    if not kept.entries:
        print("fastsae bench: no figures were taken (see the output above)", file=sys.stderr)
        return code or 1
    kept.save(seconds=session.watch.seconds())
    if options.json:
        print(kept.text(), end="")
    else:
        report.print_table(kept.entries)
    print("\nstored " + ", ".join([str(kept.path), *kept.draw()]), file=sys.stderr)
    return code


def rows(kept: report.Report, paths: list[Path], options: argparse.Namespace) -> tuple[Session, int]:
    """Runs or lists them; (what came of it, pytest's exit code)."""
    os.environ |= {"FASTSAE_BENCH_QUICK": "1" if options.quick else "0", "FASTSAE_BENCH_DEVICE": options.device}  # bench.harness reads them
    import pytest

    from bench.session import Session

    session = Session(kept, options.minutes, options.list)
    arguments = [f"--rootdir={paths[0].parents[1]}", "-s", "-p", "no:cacheprovider", *map(str, paths)]
    arguments += [*(["-k", options.rows] if options.rows else []), *["--collect-only"] * options.list]
    return session, int(pytest.main(arguments, plugins=[session]))
