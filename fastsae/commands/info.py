"""``fastsae info``: versions, CPU, GPU, and which backend serves which operation, with reasons."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import torch

from fastsae import audit, verify
from fastsae._core import triton_support
from fastsae._core.machine import machine
from fastsae.dispatch import OPS, parse_request
from fastsae.native import cuda as native_cuda
from fastsae.native import loader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")


def table(device: torch.device) -> list[dict[str, Any]]:
    """Every operation with the reason why each of its rows cannot serve float32 inputs on ``device``, or None."""
    rows = []
    for op in OPS.values():
        args = next(op.samples(device, op.dtypes[0], torch.Generator().manual_seed(0)))
        rows.append({"op": op.name, "device": str(device), "rows": dict(op.reasons(args))})
    return rows


def _problem(call: Callable[..., object], *args: str) -> str | None:
    """Why a setting of the environment is none, or None."""
    try:
        call(*args)
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


def _certified() -> dict[str, list[str] | str]:
    """The rows found right on each kind of device here; the CPU's need no certificate where the test suite runs them."""
    places = [audit.place(device) for device in verify.devices()] if loader.unavailable() is None and _problem(loader.isa) is None else []
    tested: dict[audit.Place, str] = {place: "tested with the package" for place in places if isinstance(place, str) and audit.known("cpu")}
    return {audit.kind(place): tested.get(place) or audit.certified(place) for place in places}


def run(options: argparse.Namespace) -> int:
    problem = loader.unavailable() or _problem(loader.isa)
    report: dict[str, Any] = machine()
    report["request"] = os.environ.get("FASTSAE_BACKEND") or None
    cpu = report["cpu_backend"] = _cpu_backend(problem)
    report["cuda_module"] = native_cuda.missing()
    report["triton"] = {str(device): triton_support.unavailable(device) for device in verify.devices()}
    report["triton_cache"] = triton_support.cache_directory()
    report["operations"] = [row for device in verify.devices() for row in table(device)]
    report["audit"], report["certified"] = _problem(audit.mode) or audit.mode(), _certified()
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
    print(f"audit   {report['audit']} (FASTSAE_AUDIT); certificates in {audit.certificates()}")
    for kind, rows in report["certified"].items():
        print(f"        {kind}: {rows if isinstance(rows, str) else f'{len(rows)} rows found right'}")
    if report["request"]:
        problem = _problem(parse_request, report["request"], "FASTSAE_BACKEND")
        print("request", problem or f"FASTSAE_BACKEND={report['request']}, before the order below")
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
