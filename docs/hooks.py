"""A hook of mkdocs: brings what lies outside docs/ into the site, and makes links between files of the repository links of the site."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "CITATION.cff": "CITATION.cff"}


def place(path: Path) -> str | None:
    """Where a file of the repository is in the site."""
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".ipynb":
        name = f"{name.removesuffix('.ipynb')}.md"
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return f"results/{path.relative_to(RESULTS).as_posix()}" if path.is_relative_to(RESULTS) else OUTSIDE.get(name)


def on_config(config: Any) -> None:
    """Pages of machines and studies, as many as there are."""
    for entry in config.nav:
        if "Benchmarks" in entry:
            entry["Benchmarks"] += [
                {title(p): f"benchmarks/{p.name}"} for p in sorted((ROOT / "docs/benchmarks").glob("*.md")) if p.stem != "index"
            ]
        if "Studies" in entry:
            found = sorted(RESULTS.glob("studies/*/README.md"))
            entry["Studies"] += [{path.parent.name.replace("_", " ").capitalize(): place(path)} for path in found]


def title(path: Path) -> str:
    return path.read_text().partition("\n")[0].removeprefix("# ")


def on_files(files: Any, config: Any) -> None:
    for path in [ROOT / name for name in OUTSIDE] + [p for p in RESULTS.rglob("*") if p.suffix in (".md", ".png", ".json")]:
        files.append(File.generated(config, place(path), abs_src_path=str(path)))
    for path in (ROOT / "docs").rglob("*.ipynb"):
        files.append(File.generated(config, place(path), content=notebook(path)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    source = Path(page.file.abs_src_path or ROOT / "docs" / page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        target, _, anchor = found[1].partition("#")
        if "://" in target or not target:
            return found[0]
        path = (source.parent / target).resolve()
        there = place(path) if path.is_relative_to(ROOT) and path.is_file() else None
        if there is None:
            return found[0]
        return f"]({os.path.relpath(there, os.path.dirname(page.file.src_uri) or '.')}{'#' * bool(anchor)}{anchor})"

    if page.file.src_uri.startswith("explained/"):  # MathML, which browsers show without a script
        markdown = re.sub(r"\$\$(.+?)\$\$", lambda m: mathml(m[1], "block"), markdown, flags=re.DOTALL)
        markdown = re.sub(r"\$([^$]+)\$", lambda m: f"<span>{mathml(m[1], 'inline')}</span>", markdown)
    return re.sub(r"\]\(([^)\s]+)\)", link, markdown)


def mathml(formula: str, display: str) -> str:
    bar = '<mo stretchy="false">&#x0007C;</mo>'
    return convert(formula, display=display).replace(bar, '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;</mo>')


def notebook(path: Path) -> str:
    """Cells and stored text outputs of a notebook as Markdown."""
    parts: list[str] = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", [])))
            if text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
