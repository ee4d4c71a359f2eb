"""What the documents show must run, and what they name must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastsae
from fastsae.dispatch import OPS

ROOT = Path(__file__).resolve().parent.parent


def test_readme_examples_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example, training = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert capsys.readouterr().out.count("chosen") == 1
    assert names["x_hat"].shape == names["x"].shape  # pyright: ignore[reportAttributeAccessIssue]
    pytest.importorskip("safetensors")
    exec(compile(training, "README.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt", "sae"]


def test_documents_name_what_exists() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CHANGELOG.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`fastsae\.([a-z_]+)\b", text):
        assert hasattr(fastsae, name), name


def test_every_operation_is_in_the_table_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    internal = {"decode_dvalues", "decode_dweight", "match_pair"}  # gradients and the pass behind `match`
    assert [name for name in OPS if name not in internal and f"`{name}`" not in text] == []


@pytest.mark.parametrize("name", fastsae.__all__)
def test_public_names_are_documented(name: str) -> None:
    assert (getattr(fastsae, name).__doc__ or "").strip(), name
