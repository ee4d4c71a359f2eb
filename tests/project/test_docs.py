"""What the documents show must run, what they name must exist, and the README stays a page.

Snippets of a page run one after the other in one namespace. Those that import another library run in `make test-peers`; those behind
``<!-- slow -->``, and the notebooks, run in `make deep`.
"""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import nullcontext
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from places import ROOT

import fastsae
from fastsae._core.checkout import checkout_hidden
from fastsae.dispatch import OPS

ALL = os.environ.get("FASTSAE_TEST_DOCS") == "all"
PEERS = os.environ.get("FASTSAE_REQUIRE_PEERS") == "1"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
OTHERS = re.compile(r"^\s*(?:from|import) (sae_lens|sparsify|dictionary_learning)", re.MULTILINE)
SMALLER = {"docs/guides/language-models.md": {"4096": "64", "TopK(32)": "TopK(4)", ", 200)": ", 20)"}}


def snippets(text: str, *, of_others: bool) -> list[str]:
    found = re.findall(r"(<!-- slow -->\n)?```python\n(.*?)```", text, re.DOTALL)
    return [code for slow, code in found if bool(OTHERS.search(code)) == of_others and (ALL or not slow)]


class LanguageModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(5))})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.model["layers"]:  # pyright: ignore[reportGeneralTypeIssues]  # a ModuleList
            x = x + layer(x)
        return self.head(x)


def run(page: str, codes: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    if page == "docs/guides/language-models.md":
        names = {"model": LanguageModel(), "tokens": torch.randint(0, 50, (32, 33), generator=torch.Generator().manual_seed(0))}
    for code in codes:
        for large, small in SMALLER.get(page, {}).items():
            code = code.replace(large, small)
        with checkout_hidden() if OTHERS.search(code) else nullcontext():
            exec(compile(code, page, "exec"), names)
    return names


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for what snippets write, and the environment of a process that torchrun started."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if snippets(text, of_others=False)])
def test_snippets_run(page: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    if page.endswith("sweeps.md") and ALL:
        pytest.importorskip("pandas")
    try:
        names = run(page, snippets(TEXTS[page], of_others=False))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    printed = capsys.readouterr().out
    if page == "README.md":
        assert printed.count("chosen") == 1 and (elsewhere / "sae" / "sae_weights.safetensors").exists()
        assert names["x_hat"].shape == (256, 768)
    if page == "docs/start/quickstart.md":
        assert float(printed.split()[0]) > 0.9  # the dictionary found the true features
    if page == "docs/guides/language-models.md":
        assert "1056 tokens" in printed and "ce_recovered" in printed and "Examples(values=" in printed


@pytest.mark.skipif(not PEERS, reason="snippets of other libraries run in `make test-peers`")
@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if snippets(text, of_others=True)])
def test_snippets_of_other_libraries_run(page: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(page, snippets(TEXTS[page], of_others=True))
    assert ": accelerated" in capsys.readouterr().out


@pytest.mark.skipif(not ALL, reason="notebooks run in `make deep`")
@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, elsewhere: Path) -> None:
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    if any(map(OTHERS.search, cells)):
        pytest.importorskip("dictionary_learning")
    run(path.stem, cells)


def test_the_readme_is_a_page() -> None:
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 900
    for code in snippets(text, of_others=False) + snippets(text, of_others=True):
        assert len(code.strip().splitlines()) <= 9, "eight lines and a blank one"
    for command in ("make demo", "make test", "pip install ."):
        assert re.search(rf"^{re.escape(command)}\s", text, re.MULTILINE), command


def test_links_lead_to_files() -> None:
    for page, text in {**TEXTS, **{name: (ROOT / name).read_text() for name in ("CHANGELOG.md", "CONTRIBUTING.md")}}.items():
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            path = (ROOT / page).parent / target
            assert path.exists() or path.with_suffix(".ipynb").exists(), f"{page}: {target}"


def test_documents_name_what_exists() -> None:
    for page, text in {**TEXTS, "CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text()}.items():
        for name in re.findall(r"(?:`|::: )(fastsae\.[a-zA-Z_.]+[a-zA-Z_])", text):
            try:
                resolve_name(name)
            except (ImportError, AttributeError) as error:
                raise AssertionError(f"{page}: {name}") from error


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    for path in PAGES[1:]:
        name = path.relative_to(ROOT / "docs").as_posix()
        assert name in nav or path.parent.name == "benchmarks", f"{name} is in no menu"


def test_every_operation_is_in_the_table_of_the_readme() -> None:
    text = TEXTS["README.md"]
    # Gradients, their norm, the pass behind `match`, the walk behind `dictionary_crossings`.
    internal = {"decode_dvalues", "decode_dweight", "grad_squares", "match_pair", "topk_changes"}
    assert [name for name in OPS if name not in internal and not re.search(rf"`(\w+\.)?{name}`", text)] == []


def test_every_public_module_is_in_the_reference() -> None:
    text = "".join(text for page, text in TEXTS.items() if "/reference/" in page)
    shown = set(re.findall(r"^::: fastsae\.(\w+)", text, re.MULTILINE))
    whole = {
        "sae": ["SAE", "SAEs", "TopK", "AbsTopK", "BatchTopK", "JumpReLU", "ReLU", "Gated", "AuxK"],
        "compare": ["match", "match_cosine", "mmcs"],
    }
    shown |= {name for module in shown for name in whole.get(module, [])}
    assert set(fastsae.__all__) <= shown


@pytest.mark.parametrize("name", fastsae.__all__)
def test_public_names_are_documented(name: str) -> None:
    assert (getattr(fastsae, name).__doc__ or "").strip(), name
