"""What every study has in common: its sizes, seeds, progress, tables, plots and the JSON file with machine and versions."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import pkgutil
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import fastsae
from fastsae import plots
from fastsae._core import checks, files
from fastsae._core.machine import machine, versions
from fastsae._core.progress import Bar, track
from fastsae._core.seeds import stream_seed
from fastsae._core.timing import Stopwatch
from fastsae.formats import weight_files
from fastsae.studies._page import cell, index, page

T = TypeVar("T")

_SIZES = ("smoke", "default")
REFUSED = (ValueError,)


def names() -> list[str]:
    """The studies there are."""
    package = importlib.import_module("fastsae.studies")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def _module(name: str) -> Any:
    if name not in names():
        raise ValueError(f"study: name must be one of {', '.join(names())}, got {name!r}")
    return importlib.import_module(f"fastsae.studies.{name}")


class Study:
    """One run of a study: ``study["steps"]`` is a parameter of its size; findings go through ``table``, ``record``, ``say`` and ``save``.

    Attributes:
        name, size, seed: what runs; size is "smoke" or "default".
        parameters: of this size, by name.
        out: folder that everything is written to; parts: one in it that is there while the study runs.
        progress: whether bars are shown (on stderr).
    """

    def __init__(self, name: str, size: str, seed: int, out: Path, parameters: Mapping[str, Any], *, progress: bool = True):
        self.name, self.size, self.seed, self.out, self.progress = name, size, seed, out, progress
        self.parameters, self.parts = dict(parameters), out / "parts"
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.results: dict[str, Any] = {}
        self.findings: list[str] = []
        self.plots: list[str] = []

    def __getitem__(self, parameter: str) -> Any:
        return self.parameters[parameter]

    def generator(self, stream: int = 0) -> torch.Generator:
        """A generator of this run's seed; another ``stream`` is another sequence."""
        return torch.Generator().manual_seed(stream_seed(self.seed, stream))

    def part(self, group: str, name: str, make: Callable[[], T]) -> T:
        """``make()``: numbers, text, tensors, lists and dictionaries of them. Kept: a resumed run does not make it again."""
        path = self.parts / _slug(group) / f"{_slug(name)}.pt"
        if not path.exists():
            made = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            files.replace(path, lambda file: weight_files.save_pt(file, made))
        return weight_files.load(path)[0]

    def kept(self, group: str) -> list[Any]:
        """The parts of a group that are there."""
        return [weight_files.load(path)[0] for path in sorted((self.parts / _slug(group)).glob("*.pt"))]

    def begin(self, resume: bool) -> None:
        """The folder of parts: as a run with these parameters left it, or empty."""
        record = self.parts / "run.json"
        own = _plain({"study": self.name, "size": self.size, "seed": self.seed, "parameters": self.parameters})
        if not resume:
            shutil.rmtree(self.parts, ignore_errors=True)
        elif record.exists() and json.loads(record.read_text()) != own:
            raise ValueError(f"study: --resume: {self.parts} is of another study, size, seed or parameters")
        self.parts.mkdir(parents=True, exist_ok=True)
        files.replace_text(record, json.dumps(own))

    def track(self, items: Collection[T], label: str) -> Iterator[T]:
        """``items`` with a progress bar."""
        return track(items, label, self.progress)

    def bar(self, label: str, total: int | None = None) -> Bar:
        """A progress bar to advance by hand: ``with study.bar("training", 100) as bar: bar.update(10)``."""
        return Bar(self.progress, total, label=label)

    def table(self, name: str, rows: Any) -> None:
        """Prints a table and keeps it for the JSON file.

        Args:
            name: key in the file. rows: a pandas data frame, or a list of dictionaries with the same keys.
        """
        rows = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
        self.tables[name] = [{str(key): _plain(value) for key, value in row.items()} for row in rows]
        print(f"\n{name}\n{_aligned(self.tables[name])}")

    def record(self, **values: Any) -> None:
        """Numbers, text, tensors, lists and dictionaries for the JSON file, by name."""
        self.results.update({name: _plain(value) for name, value in values.items()})

    def say(self, sentence: str) -> None:
        """A finding, printed and kept."""
        self.findings.append(sentence)
        print(f"\n{sentence}")

    def figure(self, **options: Any) -> Any:
        """A matplotlib figure and its axes (``rows``, ``columns``, ``figsize``)."""
        return plots.figure(**options)

    def save(self, canvas: Any, name: str) -> Path:
        """Writes a figure to ``NAME.png`` in the output folder."""
        path = self.out / f"{name}.png"
        plots.finish(canvas, path)
        self.plots.append(path.name)
        return path

    def write(self, seconds: float, cpu_seconds: float) -> Path:
        """The JSON file."""
        where = machine()
        where["versions"] = versions("matplotlib", "pandas", "scikit-learn", "scipy")
        report = {"study": self.name, "size": self.size, "seed": self.seed, "parameters": _plain(self.parameters)}
        report |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), **where}
        report |= {name: getattr(self, name) for name in ("findings", "tables", "results", "plots")}
        path = self.out / f"{self.name}.json"
        files.replace_text(path, _compact(report) + "\n")
        return path


def write_page(report: Path) -> Path:
    """README.md beside ``NAME.json``: the page of that run."""
    try:
        content = json.loads(report.read_text())
        text = page(content, _module(content["study"]).__doc__ or content["study"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{report} is not what a study wrote: {error!r}") from error
    path = report.with_name("README.md")
    files.replace_text(path, text)
    return path


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name)


def _plain(value: Any) -> Any:
    """A value in JSON's types; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"study: results must be numbers, text, tensors, lists and dictionaries, got {type(value).__name__}")


def _compact(report: dict[str, Any]) -> str:
    """JSON with lists of numbers on one line each."""
    text = json.dumps(report, indent=1, allow_nan=False)
    return re.sub(r"\[\s+((?:-?\d[^\s,\]]*|null)(?:,\s+(?:-?\d[^\s,\]]*|null))*)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


def _aligned(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    lines = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in lines)


def run_study(
    name: str,
    size: str = "default",
    *,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    resume: bool = False,
    **changes: Any,
) -> Study:
    """Runs a study and writes its plots, ``NAME.json`` and ``README.md``, a page with all of it.

    Args:
        name: one of ``names()``.
        size: "default"; "smoke", seconds: does it run?
        out: folder; default ``studies/NAME``.
        seed: of everything random, at least 0.
        progress: show progress bars on stderr.
        resume: take from ``out`` what a run with the same parameters had done when it was interrupted.
        changes: parameters of the size to be replaced, e.g. ``steps=500``.

    Returns: the ``Study``, with its tables, results, findings and the names of its plots.

    Raises: ValueError: an unknown study, size or parameter. ImportError: a missing package, with what to install.
    """
    module = _module(name)
    if size not in _SIZES:
        raise ValueError(f"study: size must be one of {', '.join(_SIZES)}, got {size!r}")
    seed = checks.integer("study", "seed", seed, 0)
    parameters = module.SIZES[size]
    if unknown := [key for key in changes if key not in parameters]:
        raise ValueError(f"study: unknown parameter {unknown[0]!r} of {name}; known: {', '.join(parameters)}")
    folder = Path("studies", name) if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(name, size, seed, folder, {**parameters, **changes}, progress=progress)
    study.begin(resume)
    watch = Stopwatch()
    try:
        with torch.device("cpu"):  # modules and optimisers of torch's own make tensors where the default says
            module.run(study)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is done is in {study.parts}, --resume goes on") from None
    if "joblib" in sys.modules:  # the time of a sweep's workers counts once they have ended
        importlib.import_module("joblib.externals.loky").get_reusable_executor(reuse=True).shutdown()
    seconds, cpu = watch.seconds(), watch.cpu_seconds()
    written = study.write(seconds, cpu)
    shutil.rmtree(study.parts)
    print(f"\n{seconds:.0f} s; " + ", ".join(map(str, [written, write_page(written), *(folder / plot for plot in study.plots)])))
    return study


def write_pages(folder: Path) -> int:
    """README.md of every ``NAME/NAME.json`` in a folder, and of the folder itself; ValueError if there is none."""
    found = [path for name in names() if (path := folder / name / f"{name}.json").exists()]
    if not found:
        raise ValueError(f"study: --pages: no NAME/NAME.json of a study in {folder}")
    titles = {path.stem: (_module(path.stem).__doc__ or path.stem).strip().splitlines()[0] for path in found}
    for path in found:
        write_page(path)
    files.replace_text(folder / "README.md", index([json.loads(path.read_text()) for path in found], titles))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``fastsae study``."""
    parser.add_argument("name", nargs="?", help="the study; without it, a list of all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds: does it run?")
    parser.add_argument("--out", type=Path, help="folder for JSON and plots (default: studies/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on where a run was interrupted")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument(
        "--pages", type=Path, metavar="FOLDER", help="only write the pages of FOLDER/NAME/NAME.json again, and a list of them"
    )


def run(options: argparse.Namespace) -> int:
    """``fastsae study``."""
    if options.pages is None and options.name is None:
        print(f"{'study':<14} minutes  question")
        for name in names():
            module = _module(name)
            print(f"{name:<14} {module.SIZES['default']['minutes']:<7g}  {(module.__doc__ or '').strip().splitlines()[0]}")
        return 0
    size = "smoke" if options.smoke else "default"
    if options.pages is not None:
        return write_pages(options.pages)
    minutes = _module(options.name).SIZES[size]["minutes"]
    print(f"fastsae {fastsae.__version__}: {options.name}, {size} size, about {minutes:g} min on two cores", file=sys.stderr)
    run_study(options.name, size, out=options.out, seed=options.seed, resume=options.resume)
    return 0
