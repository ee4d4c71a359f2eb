"""The demo runs on toy models, and says on its page what its files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from places import ROOT

from fastsae import load_checkpoint
from fastsae.__main__ import main


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["demo", "--smoke", "--out", str(tmp_path)]) == 0
    report, page = json.loads((tmp_path / "demo.json").read_text()), (tmp_path / "index.html").read_text()
    for name, width in (("random", 16), ("superposition", 32)):
        files = [tmp_path / name / f"seed{seed}.pt" for seed in (0, 1)]
        assert load_checkpoint(files[0]).sae.W_dec.shape == (128, width)
        capsys.readouterr()
        assert main(["mmcs", *map(str, files), "--json"]) == 0
        value = json.loads(capsys.readouterr().out)["mean"]
        assert report["results"][f"{name} mmcs"] == value and f"MMCS between the seeds {value:.4f}" in page
        assert len(report["tables"][f"{name} features"]) == 3
    assert page.count("<img ") == 7 and set(re.findall(r'(?:src|href)="([a-z]+):', page)) == {"data"}
    assert [row["operation"] for row in report["tables"]["speed"]] == ["encode_topk", "decode", "training step"]


def test_the_demo_is_short() -> None:
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "fastsae" / "demo").glob("*.py")) <= 250
