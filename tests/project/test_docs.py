"""What the documents show must run, and what they name must exist."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch
from places import ROOT

import fastsae
from fastsae.dispatch import OPS

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_examples_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example, training = EXAMPLES[0], next(text for text in EXAMPLES if "Trainer(sae, opt" in text)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert capsys.readouterr().out.count("chosen") == 1
    assert names["x_hat"].shape == names["x"].shape  # pyright: ignore[reportAttributeAccessIssue]
    pytest.importorskip("safetensors")
    exec(compile(training, "README.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt", "sae"]


def test_readme_example_of_polytopes(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(next(text for text in EXAMPLES if "fastsae.polytopes.crossings" in text), "README.md", "exec"), {})
    assert capsys.readouterr().out.count("tensor") == 2


def test_readme_example_of_a_running_model(capsys: pytest.CaptureFixture[str]) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.ModuleDict({"mlp": torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))})

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.layer["mlp"](x)

    batches = [{"x": torch.randn(2, n, 3), "attention_mask": torch.ones(2, n, dtype=torch.int64)} for n in (4, 6)]
    names = {"torch": torch, "fastsae": fastsae, "model": Model(), "batches": batches}
    exec(compile(next(text for text in EXAMPLES if "fastsae.codes.trace" in text), "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["layer", "seen"], ["layer.mlp.1", "20"], ["all", "20"]]


@pytest.mark.slow
def test_readme_example_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pandas")
    text = next(text for text in EXAMPLES if "sweep(" in text)
    assert 'stop="converged"' in text
    exec(compile(text.replace('stop="converged"', "stop=3"), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 5  # two lines of header, a line for each L1


def test_readme_example_of_a_language_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)

    class Model(torch.nn.Module):
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

    text = next(text for text in EXAMPLES if "harvest(" in text).replace("4096", "64").replace("TopK(32)", "TopK(4)")
    names = {"model": Model(), "tokens": torch.randint(0, 50, (32, 33), generator=torch.Generator().manual_seed(0))}
    exec(compile(text, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "1056 tokens" in printed and "ce_recovered" in printed and "Examples(values=" in printed


def test_readme_example_of_another_library() -> None:
    names: dict[str, object] = {}
    exec(compile(next(text for text in EXAMPLES if "entry_points" in text), "README.md", "exec"), names)
    assert names["reason"] is None or "extension" in str(names["reason"])


def test_readme_example_of_several_processes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    names: dict[str, object] = {}
    try:
        exec(compile(next(text for text in EXAMPLES if "distributed.shard" in text), "README.md", "exec"), names)
    finally:
        torch.distributed.destroy_process_group()
    assert "Metrics(loss=" in capsys.readouterr().out and type(names["whole"]) is fastsae.SAE


def test_documents_name_what_exists() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CHANGELOG.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`fastsae\.([a-z_]+)\b", text):
        assert hasattr(fastsae, name), name


def test_every_operation_is_in_the_table_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    internal = {"decode_dvalues", "decode_dweight", "grad_squares", "match_pair"}  # gradients, their norm, the pass behind `match`
    assert [name for name in OPS if name not in internal and f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", fastsae.__all__)
def test_public_names_are_documented(name: str) -> None:
    assert (getattr(fastsae, name).__doc__ or "").strip(), name
