"""The demo's page: one HTML file with its plots inside, for a reader who has not met dictionaries before."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastsae._core import files
from fastsae.studies import Study

_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fastsae demo</title>
<style>body{font:17px/1.6 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}h2{margin-top:3rem}
img{max-width:100%}figure{margin:1.5rem 0}figcaption{color:#57606a;font-size:.9rem}li{overflow-wrap:anywhere}div{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem}td,th{padding:.3rem .6rem;border-bottom:1px solid #d0d7de;text-align:left}</style>
<h1>What the features of a model say</h1><p>A neural network stores more features than it has neurons, as directions in its activations. A
<b>sparse autoencoder</b> learns a dictionary of such directions: it writes each activation as a sum of a few of many features. Here fastsae
trained dictionaries on activations of the models below, on this machine, and looked at what they learnt.</p>"""
_TABLE = """<p>Some features: the tokens on which each is largest, and one of them [in brackets] in its text. Nats, where there are any: how
much the model's next word changes where the feature fires, if it is removed.</p>"""
_PLOTS = {
    "training.png": "Training: the share of the variance that is not explained. Points: tokens that were not trained on.",
    "matches.png": "Each feature's most similar one in the dictionary of another seed. The mean is MMCS, 1 if both runs found the same.",
    "hamming.png": "A spline code says which neurons are on. Tokens of near codes are treated by nearly the same linear map.",
}


def write(study: Study, explored: Sequence[tuple[str, str, list[str]]]) -> Path:
    """``index.html``. explored: of each model its name, what it is, and what was found."""
    parts = [_HEAD]
    for name, about, findings in explored:
        told = [escape(finding.removeprefix(f"{name}: ")) for finding in findings]
        items = "".join(f"<li>{one[0].upper()}{one[1:]}</li>" for one in told)
        parts += [f"<h2>{escape(about)}</h2><ul>{items}</ul>{_TABLE}{_table(study.tables[f'{name} features'])}"]
        parts += [_figure(study.out / name / plot, text) for plot, text in _PLOTS.items()]
    parts += ["<h2>Speed</h2>", _figure(study.out / "speed.png", "Each operation beside plain torch, in turns. Longer is better.")]
    parts += ["<p>All numbers: demo.json. Dictionaries: seed0.pt and seed1.pt of each folder, for fastsae.load_checkpoint and "]
    files.replace_text(path := study.out / "index.html", "\n".join([*parts, "<code>fastsae mmcs FOLDER/seed*.pt</code>.</p></html>\n"]))
    return path


def _figure(path: Path, caption: str) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{path.stem}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption></figure>'


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    lines = ["<tr><td>" + "<td>".join(map(escape, line)) for line in ([name.replace("_", " ") for name in rows[0]], *cells)]
    return f"<div><table>{''.join(lines)}</table></div>"
