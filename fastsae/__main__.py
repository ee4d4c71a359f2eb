"""Command line: ``fastsae info | verify | bench | demo | mmcs | study`` (also ``python -m fastsae``)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import fastsae
from fastsae import verify
from fastsae._core import triton_support
from fastsae._core.checkout import checkout
from fastsae._core.machine import machine
from fastsae.compare.dictionaries import as_dictionaries
from fastsae.dispatch import OPS, parse_request
from fastsae.native import cuda as native_cuda
from fastsae.native import loader


def table(device: torch.device) -> list[dict[str, Any]]:
    """Every operation with the reason why each of its rows cannot serve float32 inputs on ``device``, or None."""
    rows = []
    for op in OPS.values():
        args = next(op.samples(device, op.dtypes[0], torch.Generator().manual_seed(0)))
        rows.append({"op": op.name, "device": str(device), "rows": dict(op.reasons(args))})
    return rows


def _level_problem() -> str | None:
    """Why FASTSAE_ISA names no level that runs here, or None."""
    try:
        loader.isa()
    except ValueError as error:
        return str(error)
    return None


def _request_problem() -> str | None:
    """Why FASTSAE_BACKEND is no request, or None."""
    try:
        parse_request(os.environ["FASTSAE_BACKEND"], "FASTSAE_BACKEND")
    except ValueError as error:
        return str(error)
    return None


def _cpu_backend(problem: str | None) -> dict[str, Any]:
    return {
        "available": problem is None,
        "reason": problem,
        "build": loader.build_info(),
        "features": [name for name, has in loader.cpu_features().items() if has] if problem is None else [],
        "levels": loader.isa_levels() if problem is None else [],
        "level": loader.isa() if problem is None else None,
        "threads": loader.threads_info() if problem is None else None,
    }


def info(options: argparse.Namespace) -> int:
    problem = loader.unavailable() or _level_problem()
    report: dict[str, Any] = machine()
    report["request"] = os.environ.get("FASTSAE_BACKEND") or None
    cpu = report["cpu_backend"] = _cpu_backend(problem)
    report["cuda_module"] = native_cuda.missing()
    report["triton"] = {str(device): triton_support.unavailable(device) for device in verify.devices()}
    report["triton_cache"] = triton_support.cache_directory()
    report["operations"] = [row for device in verify.devices() for row in table(device)]
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    print("  ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(f"CPU     {report['cpu']}, {report['cores']} cores, {report['threads']} threads")
    print(f"GPU     {', '.join(report['gpu']) or 'none'}")
    print(f"cuda    {report['cuda_module'] or 'module loads'}")
    if problem is None:
        print(f"cpu     level {cpu['level']} of {', '.join(cpu['levels'])} (FASTSAE_ISA selects one); {cpu['threads']}")
    else:
        print(f"cpu     {problem}")
    for device, reason in report["triton"].items():
        kept = f"; compiled kernels in {report['triton_cache']}" if device.startswith("cuda") else ""
        print(f"triton  {device}: {reason or 'available' + kept}")
    if report["request"]:
        print("request", _request_problem() or f"FASTSAE_BACKEND={report['request']}, before the order below")
    print()
    notes: dict[str, int] = {}
    for row in report["operations"]:
        cells = []
        for backend, reason in row["rows"].items():
            mark = "" if reason is None else f"[{notes.setdefault(reason, len(notes) + 1)}]"
            cells.append(f"{backend}{mark or ' ✓'}")
        print(f"  {row['op']:<18} {row['device']:<7} {'   '.join(cells)}")
    print("\n  in order of preference; ✓ serves float32, [n] does not, because")
    for reason, number in notes.items():
        print(f"  [{number}] {reason}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    request = options.backend or os.environ.get("FASTSAE_BACKEND")
    try:
        backends = None if not request else [name for name in parse_request(request) if name != "*"] or None
    except ValueError as error:
        print(f"fastsae verify: {error}", file=sys.stderr)
        return 2
    names = options.ops.split(",") if options.ops else None
    if names and (unknown := [name for name in names if name not in OPS]):
        print(f"fastsae verify: unknown operation {', '.join(unknown)}; known: {', '.join(OPS)}", file=sys.stderr)
        return 2
    live = sys.stderr.isatty() and not options.json
    results = verify.run(
        ops=names,
        backends=backends,
        timing=not options.no_timing,
        progress=lambda text: print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True) if live else None,
    )
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    failures = [result for result in results if result.failure]
    if options.json:
        print(json.dumps({**machine(), "results": [result.as_dict() for result in results], "passed": not failures}, indent=1))
    else:
        print(f"{'operation':<18} {'backend':<20} {'dtype':<9} {'samples':>7}  {'error':>6}  {'ms':>9}  {'x reference':>11}")
        for result in results:
            speed = f"{result.milliseconds:9.3f}  {result.ratio:11.2f}" if result.milliseconds is not None else f"{'':>9}  {'':>11}"
            verdict = "  FAILED: " + result.failure if result.failure else ""
            backend = result.backend if result.device == "cpu" else f"{result.backend} {result.device}"
            print(f"{result.op:<18} {backend:<20} {result.dtype:<9} {result.samples:>7}  {result.error:>6.2f}  {speed}{verdict}")
        print("\nerror: largest, as a fraction of the tolerance (0: equal bit for bit, or float64 against itself)")
        print("ms, x reference: median on a moderate workload, and its ratio to the PyTorch reference in the same run")
        print(f"{len(results) - len(failures)} passed, {len(failures)} failed")
    if not results:
        print(f"fastsae verify: nothing to verify for backend {request!r} on this machine (see `fastsae info`)", file=sys.stderr)
        return 2
    return 1 if failures else 0


def bench(options: argparse.Namespace) -> int:
    root = checkout()
    if root is None:
        print("fastsae bench: the benches live in a source checkout; clone the repository and run `make bench` there.", file=sys.stderr)
        return 2
    sys.path.insert(0, str(root))
    from bench.command import run

    return run(options, root, machine())


def demo(options: argparse.Namespace) -> int:
    from fastsae import demo as module

    return module.run(options)


def mmcs(options: argparse.Namespace) -> int:
    paths = options.dictionaries
    if len(paths) < 2 or (options.plot and len(paths) > 2) or (options.variant and (options.plot or len(paths) > 2)):
        print("fastsae mmcs: give two dictionaries, or more of them without --plot and --variant", file=sys.stderr)
        return 2
    try:
        loaded = as_dictionaries("mmcs", paths, paths)
        for path, weight in zip(paths, loaded):
            if broken := int((~weight.isfinite()).any(1).sum()):
                raise ValueError(
                    f"mmcs: {path}: {broken} of {len(weight)} features are not finite (fastsae.mmcs(.., alive=) leaves them out)"
                )
        report: dict[str, Any] = {"dictionaries": [{"path": str(p), "shape": list(w.shape)} for p, w in zip(paths, loaded)]}
        if options.variant:
            report[options.variant] = fastsae.mmcs(loaded[0], loaded[1], variant=options.variant)
        elif len(paths) > 2:
            report["a_to_b"] = fastsae.compare.mmcs_matrix(loaded).tolist()
        else:
            found = fastsae.match(*loaded)
            report |= {direction: found.mmcs(direction) for direction in ("a_to_b", "b_to_a", "mean")}
            sides = {"a_to_b": found.a_to_b, "b_to_a": found.b_to_a}
            report["above 0.9"] = {name: float((side.similarity > 0.9).double().mean()) for name, side in sides.items()}
            if options.plot:
                found.plot(options.plot)
    except (TypeError, ValueError) as error:
        print(f"fastsae {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report, indent=1))
        return 0
    names = "ab" if len(paths) == 2 else [str(number) for number in range(len(paths))]
    for name, one in zip(names, report["dictionaries"]):
        print(f"{name}  {one['shape'][0]} features, D = {one['shape'][1]}  {one['path']}")
    if options.variant:
        print(f"{options.variant}  {report[options.variant]:.4f}")
    elif len(paths) > 2:
        print("mean best cosine of the row's features in the column")
        for row in report["a_to_b"]:
            print("  ".join(f"{value:.4f}" for value in row))
    else:
        for direction in ("a_to_b", "b_to_a"):
            print(f"{direction}  {report[direction]:.4f}  above 0.9: {report['above 0.9'][direction]:.1%}")
        print(f"mean    {report['mean']:.4f}")
    return 0


def study(options: argparse.Namespace) -> int:
    from fastsae.studies import _frame

    return _frame.main(options)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="fastsae", description="Exact, deterministic kernels for sparse autoencoders.")
    result.add_argument("--version", action="version", version=fastsae.__version__)
    commands = result.add_subparsers(dest="command", required=True)

    one = commands.add_parser("info", help="versions, CPU, GPU, and which backend serves which operation, with reasons")
    one.add_argument("--json", action="store_true")
    one.set_defaults(run=info)

    one = commands.add_parser("verify", help="run every backend against its specification on this machine; exit code 1 on a mismatch")
    one.add_argument("--ops", help="comma-separated operations; default all")
    one.add_argument("--backend", help="comma-separated backends; default FASTSAE_BACKEND, else all")
    one.add_argument("--no-timing", action="store_true", help="verify only")
    one.add_argument("--json", action="store_true")
    one.set_defaults(run=run_verify)

    one = commands.add_parser("bench", help="time operations beside the best plain torch (in a checkout)")
    one.add_argument("ops", nargs="*", help="names of bench/bench_*.py; default all")
    one.add_argument("--out", type=Path, help="folder for JSON and plot; default bench/results of the checkout")
    one.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda without names: the GPU table, see bench/gpu")
    one.add_argument("--list", action="store_true", help="operations, shapes and expected minutes; nothing is run")
    one.add_argument("--minutes", type=float, help="no row is begun that would pass them (default: no limit; 4 for the GPU table)")
    one.add_argument("--quick", action="store_true", help="small shapes: does it run, not how fast")
    one.add_argument("--rows", metavar="EXPRESSION", help="only rows whose name fits, as pytest's -k")
    one.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    one.set_defaults(run=bench)

    one = commands.add_parser("demo", help="train a dictionary on real activations and look at it")
    from fastsae.demo import add_arguments

    add_arguments(one)
    one.set_defaults(run=demo)

    one = commands.add_parser("mmcs", help="mean max cosine similarity of dictionaries in files or folders")
    one.add_argument("dictionaries", nargs="+", help="files or folders of weights, checkpoints; more than two: all pairs")
    names = sorted(fastsae.compare.MMCS_VARIANTS)
    one.add_argument("--variant", choices=names, metavar="NAME", help=f"a published variant of the number: {', '.join(names)}")
    one.add_argument("--plot", type=Path, help="image of both directions' histograms beside random vectors (matplotlib)")
    one.add_argument("--json", action="store_true")
    one.set_defaults(run=mmcs)

    one = commands.add_parser("study", help="run an experiment: tables, plots and JSON; without a name, list them")
    from fastsae.studies._frame import add_arguments

    add_arguments(one)
    one.set_defaults(run=study)
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        code = options.run(options)
        print(end="", flush=True)  # here, where a full disk or a closed pipe can be said, and not when Python ends
        return code
    except (OSError, ImportError) as error:
        try:
            print(end="", flush=True)
        except OSError:  # it is stdout that failed: what is left in its buffer goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader of a pipe has seen enough (`fastsae info | head`)
            return 0
        print(f"fastsae {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nfastsae {options.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
