"""docs/saelens.md: every architecture and file kind that SAELens registers, and what becomes of it here. A new one has to be answered for.

``python tests/interop/test_saelens_table.py`` writes it anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from peers import load
from places import ROOT

from fastsae.formats.pretrained import SAELENS
from fastsae.patch import saelens

sae_lens = load("sae_lens", "sae-lens")
from sae_lens import registry  # noqa: E402
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS  # noqa: E402

PAGE = ROOT / "docs" / "saelens.md"

KINDS = {
    "sae_lens": "yes: folders of `save_model`, of versions before 6 too, and of its trainer's checkpoints, with every normalisation but a "
    "whitening that is not folded (rows that are normalised: not with a skip)",
    "connor_rob_hook_z": "no: its configuration is of one release; `accelerate` SAELens' object, or save that and load it",
    "gemma_2": 'yes: `format="gemma_scope"` (embedding SAEs as the file says, without SAELens\' factor sqrt(D))',
    "gemma_2_transcoder": 'yes: `format="gemma_scope"`',
    "gemma_3": 'yes: `format="gemma_scope_2"`, affine skips too; the folder of a cross-layer transcoder by '
    "`CrossLayerTranscoder.from_pretrained` (one layer alone, whose decoders SAELens sums, reconstructs nothing and is refused)",
    "llama_scope": 'yes: `format="llama_scope"`, the scale of the inputs folded in',
    "llama_scope_r1_distill": 'yes: `format="llama_scope"`; `scaling_factor=` where the file does not hold the mean norm of the inputs',
    "dictionary_learning_1": 'yes: `format="dictionary_learning"`',
    "deepseek_r1": 'yes: `format="deepseek_r1"` has to be given, the file says nothing',
    "goodfire": 'yes: `format="goodfire"`',
    "qwen_scope": 'yes: `format="qwen_scope"`; `k=` where the path does not hold the repository\'s name',
    "sparsify": 'yes: `format="sparsify"`, as sparsify computes it (SAELens transposes its decoder)',
    "mwhanna_transcoder": 'yes: `format="circuit_tracer"`',
    "mntss_clt_layer_transcoder": "not a layer alone, whose decoders write to many layers: the folder by "
    "`CrossLayerTranscoder.from_pretrained`",
    "temporal": "no: its latents depend on the other tokens",
}
"""What becomes of the files of each loader of SAELens."""


def rows() -> Iterator[str]:
    for name in dict.fromkeys([*registry.SAE_CLASS_REGISTRY, *registry.SAE_TRAINING_CLASS_REGISTRY]):
        cells = [name, "yes" if name in SAELENS else f"no: {_why(name)}"]
        for classes in (registry.SAE_CLASS_REGISTRY, registry.SAE_TRAINING_CLASS_REGISTRY):
            cells.append(_accelerated(classes[name][0]) if name in classes else "no such class")
        cells.append(_trained(name))
        yield "| " + " | ".join(cells) + " |"


def _adapter(cls: type) -> Any:
    return saelens.LIBRARY.adapters.get(f"{cls.__module__}.{cls.__qualname__}", saelens.LIBRARY.rest)


def _why(name: str) -> str:
    cls = (registry.SAE_CLASS_REGISTRY | registry.SAE_TRAINING_CLASS_REGISTRY)[name][0]
    return _adapter(cls).leaves.get("encode", "`SAE` has no such activation")


def _accelerated(cls: type) -> str:
    adapter = _adapter(cls)
    return "yes" if adapter.mixin is not None else f"`fastsae.encode` by its own: {adapter.leaves['encode']}"


def _trained(name: str) -> str:
    """Of an SAE of default settings."""
    if name not in registry.SAE_TRAINING_CLASS_REGISTRY:
        return "SAELens does not train it"
    cls, config = registry.SAE_TRAINING_CLASS_REGISTRY[name]
    more = {"matryoshka_widths": [2, 8]} if "matryoshka" in name else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = saelens._train.why_never_fused(cls(config(d_in=4, d_sae=8, **more, **({"k": 2} if "topk" in name else {}))))
    return "fused steps" if reason is None else "our optimiser step; forward and backward are SAELens' own"


def page() -> str:
    version = ".".join(sae_lens.__version__.split(".")[:2])
    kinds = [f"| {name} | {KINDS[name]} |" for name in NAMED_PRETRAINED_SAE_LOADERS]
    return "\n".join(
        [
            "# SAELens here",
            "",
            f"Written from the registries of sae-lens {version} by `tests/interop/test_saelens_table.py`.",
            "",
            "## Architectures",
            "",
            "| architecture | `SAE.from_pretrained` | `accelerate`: SAE | `accelerate`: training SAE | `accelerate`: `SAETrainer` |",
            "|---|---|---|---|---|",
            *rows(),
            "",
            "Any other SAE derived from SAELens' `SAE` has `fastsae.encode` and `fastsae.reconstruct` by its own methods.",
            "",
            "## Files",
            "",
            "| loader of SAELens | `SAE.from_pretrained` |",
            "|---|---|",
            *kinds,
            "",
            "Beyond these: circuit-tracer's transcoders, of a layer and cross-layer (read and written), OpenAI's autoencoders,",
            "dictionary_learning's checkpoints, backups and forks.",
            "",
        ]
    )


def test_the_page_is_current() -> None:
    assert set(KINDS) == set(NAMED_PRETRAINED_SAE_LOADERS), "a loader that is new or gone: answer for it in KINDS"
    assert PAGE.read_text() == page(), "python tests/interop/test_saelens_table.py writes it anew"


if __name__ == "__main__":
    PAGE.write_text(page())
