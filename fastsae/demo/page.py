"""The demo's page: one HTML file with its plots inside, for a reader who has not met dictionaries before."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from fastsae._core import files
from fastsae.studies import Study

_STYLE = """body{font:17px/1.6 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
h1,h2{line-height:1.25}h2{margin-top:3rem}img{max-width:100%}figure{margin:1.5rem 0}figcaption,footer{color:#57606a;font-size:.9rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}td,th{padding:.3rem .6rem;border-bottom:1px solid #d0d7de;text-align:left}
code{background:#f0f2f4;padding:.1em .3em;border-radius:4px;overflow-wrap:anywhere}"""

_PLOTS = {
    "training.png": "Training: the share of the variance that the dictionary does not explain. Points: rows that it was not trained on.",
    "matches.png": "Each feature's most similar one in the dictionary of the other seed, beside random vectors. The mean is MMCS, the mean "
    "max cosine similarity: 1 if both training runs found the same features.",
    "hamming.png": "A spline code says which neurons of a layer are on. Tokens with near codes are treated by nearly the same linear map.",
}


def write(study: Study, explored: Sequence[tuple[str, str, list[str]]]) -> Path:
    """``index.html``. explored: of each model its name, what it is, and what was found."""
    parts = [
        "<p>A neural network stores more features than it has neurons, as directions in its activations. A <b>sparse autoencoder</b> learns "
        "a dictionary of such directions: it writes each activation as a sum of a few of many features. Here fastsae trained dictionaries on "
        "activations of the models below, on this machine, and looked at what they learnt.</p>"
    ]
    for name, about, findings in explored:
        parts.append(f"<h2>{html.escape(about)}</h2><ul>")
        parts += [f"<li>{html.escape(finding.removeprefix(f'{name}: '))}</li>" for finding in findings]
        parts.append("</ul><p>What some features say: the tokens on which each is largest, and one of them [in brackets] in its text. ")
        parts.append("The last column, where there is one: how much the model's next word changes (nats) when the feature is removed.</p>")
        parts += [_table(study.tables[f"{name} features"]), *(_figure(study.out / name / plot, text) for plot, text in _PLOTS.items())]
    parts += [
        "<h2>Speed</h2>",
        _figure(study.out / "speed.png", "Each operation beside a plain torch version, in turns. Longer is better."),
    ]
    made = "All numbers: demo.json. Dictionaries: seed0.pt and seed1.pt in each model's folder (fastsae.load_checkpoint)."
    text = f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fastsae demo</title><style>{_STYLE}</style><h1>What the features of a model say</h1>
{"".join(parts)}<footer>{made}</footer></html>
"""
    files.replace_text(path := study.out / "index.html", text)
    return path


def _figure(path: Path, caption: str) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{path.stem}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption></figure>'


def _table(rows: list[dict[str, object]]) -> str:
    def line(cells: Sequence[object], kind: str) -> str:
        shown = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in shown) + "</tr>"

    heads = [name.replace("_", " ") for name in rows[0]] if rows else []
    return f'<div class="wide"><table>{line(heads, "th")}{"".join(line(list(row.values()), "td") for row in rows)}</table></div>'
