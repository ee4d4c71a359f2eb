"""A page for each run of a study: its question, what it found, its plots, tables, parameters and machine, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ROWS = 40  # of a table; the rest is in the JSON file


def page(report: Mapping[str, Any], about: str) -> str:
    """Markdown of a run.

    Args:
        report: what ``NAME.json`` holds. about: the study's docstring; its first line is the title.
    """
    title, _, text = about.strip().partition("\n")
    name, size = report["study"], report["size"]
    command = " ".join(
        ["fastsae study", name, *([f"--{size}"] * (size != "default")), *([f"--seed {report['seed']}"] * (report["seed"] > 0))]
    )
    parts = [f"# {title}", _prose(text), f"Written by `{command}` from [{name}.json]({name}.json).", "## What it found"]
    parts.append("\n".join(f"- {sentence}" for sentence in report["findings"]))
    parts += [f"![{name}: {Path(plot).stem}]({plot})" for plot in report["plots"]]
    for label, rows in report["tables"].items():
        parts += [f"## {label.replace('_', ' ').capitalize()}", table(rows)]
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items() if version != "not installed")
    parts += [
        "## The run",
        table([{"parameter": key, "value": value} for key, value in report["parameters"].items() if key != "minutes"]),
        f"Size {size}, seed {report['seed']}, {report['seconds']:g} s{_cpu(report)} on {report['cpu']} ({report['cores']} cores, "
        f"{report['threads']} threads in the process that started it){', ' + ', '.join(report['gpu']) if report['gpu'] else ''}; "
        f"commit {report['commit']}; {versions}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def index(reports: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Markdown that lists runs, each in a folder of its name. titles: first lines of the studies' docstrings."""
    rows = [
        {"study": f"[{r['study']}]({r['study']}/README.md)", "question": titles[r["study"]]}
        | {"size": r["size"], "seconds": r["seconds"], "CPU seconds": r.get("cpu_seconds")}
        for r in sorted(reports, key=lambda r: r["study"])
    ]
    return f"# Studies\n\n`fastsae study NAME` repeats one and writes its page.\n\n{table(rows)}\n"


def _cpu(report: Mapping[str, Any]) -> str:
    return f" ({report['cpu_seconds']:g} s of CPU time)" if "cpu_seconds" in report else ""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of at most 40 rows; the last line says how many more there are."""
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([cell(row.get(column)) for column in columns] for row in rows[:_ROWS])]
    more = f"\n\n{len(rows) - _ROWS} more rows in the JSON file." if len(rows) > _ROWS else ""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + more


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(cell, value)) or "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", r"\|")


def _prose(text: str) -> str:
    """Docstring as Markdown: paragraphs on one line, double backquotes single."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.replace("``", "`").split("\n\n") if paragraph.strip())
