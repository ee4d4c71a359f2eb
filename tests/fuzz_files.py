"""Coverage-guided fuzzing of everything that reads a file: ``python tests/fuzz_files.py SECONDS [SEED] [--plain]``.

Starts from small files of every kind and mutates them: bits and bytes, cuts, repeats, pieces of other files; numbers and types in JSON; and
what lies behind a checksum or a size (members of archives, the entry of ours, array and safetensors headers), with the checksum put right
again. What reaches a new line of the readers is kept and mutated further (``--plain``: not so, and faster). A reader may refuse by
ValueError (FileNotFoundError), and what it takes must compute; nothing else may come, no more than 300 MB be used, none take 5 seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import fastsae
from fastsae import SAE, BatchTopK, Gated, JumpReLU, SAEs, TopK, load_checkpoint, mmcs, optim, save_checkpoint
from fastsae.codes import CodeCounter

D, F, K = 4, 12, 3
READERS = tuple(f"{Path(fastsae.__file__).parent}/{name}" for name in ("codes/counters", "formats/", "optim", "sae/", "trainer"))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


# ---------------------------------------------------------------- files to start from: {name: bytes}, and what reads them

Files = dict[str, bytes]


def seeds(folder: Path) -> list[tuple[str, Files]]:
    made: list[tuple[str, Path]] = []
    kinds = {"topk": TopK(K), "batchtopk": BatchTopK(2.5), "jumprelu": JumpReLU(0.1, bandwidth=0.5), "gated": Gated()}
    for name, activation in kinds.items():
        sae = SAE(D, F, activation, seed=0, prefixes=[5, F] if name == "batchtopk" else None)
        made.append(("sae", sae.save(folder / name)))
        opt = optim.Adam(sae) if name != "gated" else torch.optim.Adam(sae.parameters())
        if isinstance(opt, optim.Adam):
            opt.step(draw(8, D))
        (folder / f"{name} checkpoint").mkdir()
        save_checkpoint(folder / f"{name} checkpoint" / "x.pt", sae, opt, {"step": 3, "list": [1, {"a": torch.arange(3)}]})
        made.append(("checkpoint", folder / f"{name} checkpoint"))
    for format in ("saelens", "sparsify", "dictionary_learning"):  # noqa: A001
        made.append(("sae", SAE(D, F, TopK(K), seed=0).save_pretrained(folder / format, format=format)))  # pyright: ignore[reportArgumentType]
    stack = SAEs([SAE(D, F, TopK(K), seed=seed) for seed in range(2)])
    (folder / "stack").mkdir()
    save_checkpoint(folder / "stack" / "x.pt", stack, optim.Adam(stack))
    made.append(("checkpoint", folder / "stack"))
    bare = {"W_enc": draw(D, F), "b_enc": draw(F), "W_dec": draw(F, D), "b_dec": draw(D), "threshold": draw(F).abs()}
    linear = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "decoder.weight": draw(D, F), "b_dec": draw(D), "k": torch.tensor(K)}
    for name, save in (("gemma", np.savez), ("gemma deflated", np.savez_compressed)):
        (folder / name).mkdir()
        save(folder / name / "params.npz", **{key: value.numpy() for key, value in bare.items()})
        made.append(("sae", folder / name))
    (folder / "dl").mkdir()
    torch.save({**linear, "threshold": torch.tensor(0.1)}, folder / "dl" / "ae.pt")
    (folder / "dl" / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE", "activation_dim": D, "dict_size": F}}))
    made.append(("sae", folder / "dl"))
    (folder / "lens").mkdir()
    save_file(bare, folder / "lens" / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": D, "d_sae": F, "dtype": "float32", "metadata": {"sae_lens_version": "6.1.0"}}
    (folder / "lens" / "cfg.json").write_text(json.dumps(config))
    made.append(("sae", folder / "lens"))
    (folder / "counter").mkdir()
    counter = CodeCounter(["a", "b"])
    counter.update({"a": torch.arange(30) % 7, "b": torch.arange(30) % 5})
    counter.save(folder / "counter" / "x.npz")
    made.append(("counter", folder / "counter"))
    return [(kind, {path.name: path.read_bytes() for path in place.iterdir()}) for kind, place in made]


def read(kind: str, folder: Path) -> None:
    path = next((p for p in folder.iterdir() if p.suffix != ".json"), folder)
    if kind == "counter":
        counter = CodeCounter.load(path)
        counter.merge(counter)
        str(counter.table())
        return
    if kind == "checkpoint":
        sae = load_checkpoint(path).sae
        opt = optim.Adam(sae)
        with contextlib.suppress(ValueError):
            load_checkpoint(path, sae, opt)
        assert opt.steps >= 0
        sae = sae[0] if isinstance(sae, SAEs) else sae
    else:
        sae = SAE.from_pretrained(folder)
        with contextlib.suppress(ValueError):  # weights that are not finite
            mmcs(path, sae)
    assert sae(torch.zeros(2, sae.d_in, dtype=sae.W_dec.dtype)).x_hat.shape == (2, sae.d_out)


# ---------------------------------------------------------------- mutations


def bits(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not out:
            break
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 400))
        kind = rng.randrange(8)
        size = rng.choice((1, 1, 2, 4, 8, 40))
        if kind <= 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 3:
            del out[at : at + size]
        elif kind == 4:
            out[at:at] = out[at : at + size] * rng.choice((1, 2, 50))
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            number = rng.choice((0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 10**9))
            width = rng.choice((2, 4, 8))
            out[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, rng.choice(("little", "big")))  # pyright: ignore[reportArgumentType]
        else:
            other = rng.choice(others)
            start = rng.randrange(max(len(other), 1))
            out[at : at + size] = other[start : start + rng.choice((size, 200))]
    return bytes(out)


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    2.5,
    1e308,
    float("nan"),
    10**9,
    10**18,
    2**63,
    "",
    "topk",
    "batchtopk",
    "gated",
    [],
    [1],
    {},
]


def values(rng: random.Random, value: Any) -> Any:
    """Somewhere in a JSON value another one."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.randrange(10)
        if kind == 0:
            return {name: item for name, item in value.items() if name != key}
        if kind == 1:
            return {**value, rng.choice(sorted(value)) + rng.choice(("", "x")): value[key]}
        return {**value, key: values(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], values(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


def sealed(rng: random.Random, entry: str) -> str:
    text = json.dumps(values(rng, json.loads(entry[9:])))
    return f"{zlib.crc32(text.encode()):08x} {text}"


def json_text(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    return json.dumps(values(rng, json.loads(raw))).encode()


def archive(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    """A member of an archive, with sizes and checksums put right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        members = old.infolist()
        chosen = rng.choice(members).filename if rng.random() < 0.5 else members[0].filename
        for member in members:
            content = old.read(member)
            if member.filename == chosen:
                if chosen.endswith("/fastsae"):
                    content = sealed(rng, content.decode()).encode()
                elif rng.random() < 0.1:
                    continue
                else:
                    content = bits(rng, content, others)
            new.writestr(member.filename, content, rng.choice((member.compress_type,) * 9 + (zipfile.ZIP_DEFLATED,)))
    return out.getvalue()


def header(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    """The header of a safetensors file, with its length put right; also the entry of ours, with its checksum."""
    size = struct.unpack("<Q", raw[:8])[0]
    about, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    own = about.get("__metadata__", {}).get("fastsae")
    if own is not None and rng.random() < 0.7:
        about["__metadata__"]["fastsae"] = sealed(rng, own)
    else:
        about = values(rng, about)
        if own is not None and rng.random() < 0.7 and isinstance(about, dict):
            about.pop("__metadata__", None)
    text = json.dumps(about).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate(rng: random.Random, files: Files, others: list[Files]) -> Files:
    name = rng.choice(sorted(files))
    raw, pieces = files[name], [rng.choice(sorted(rng.choice(others).values())) for _ in range(2)]
    ways: list[Callable[[random.Random, bytes, list[bytes]], bytes]] = [bits]
    ways += [json_text] * 6 if name.endswith(".json") else [archive] * 4 if name.endswith((".pt", ".npz")) else [header] * 4
    try:
        return {**files, name: rng.choice(ways)(rng, raw, pieces)}
    except Exception:  # what was mutated before is no archive any more
        return {**files, name: bits(rng, raw, pieces)}


# ---------------------------------------------------------------- the loop


class Coverage:
    """Lines of the readers that one call has reached."""

    def __init__(self) -> None:
        self.known: set[tuple[str, int, int]] = set()
        self.now: set[tuple[str, int, int]] = set()

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        return self.line if frame.f_code.co_filename.startswith(READERS) else None

    def line(self, frame: Any, event: str, argument: Any) -> Any:
        self.now.add((frame.f_code.co_filename, frame.f_lineno, event == "exception"))
        return self.line

    def run(self, call: Callable[[], None]) -> None:
        self.now = set()
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(None)
            self.known |= self.now


def run(seconds: float, seed: int = 0, plain: bool = False) -> dict[str, int]:
    """Counts; AssertionError with the folder of the input that broke something."""
    rng, coverage = random.Random(seed), Coverage()
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(prefix="fuzz-files-"))
    corpus = seeds(root)
    for kind, files in corpus:
        write(root / "now", files)
        coverage.run(partial(read, kind, root / "now"))
    used, counts = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, dict.fromkeys(("runs", "refused", "taken", "kept"), 0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        kind, files = rng.choice(corpus)
        files = mutate(rng, files, [other for _, other in corpus])
        write(root / "now", files)  # a crash of the process leaves it there
        counts["runs"] += 1
        known, start, outcome = len(coverage.known), time.monotonic(), "taken"
        try:
            if plain:
                read(kind, root / "now")
            else:
                coverage.run(partial(read, kind, root / "now"))
        except (ValueError, FileNotFoundError):
            outcome = "refused"
        except BaseException as error:
            raise AssertionError(f"{root / 'now'} ({kind}): {type(error).__name__}: {error}") from error
        counts[outcome] += 1
        taken, memory = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
        assert taken < 5, f"{root / 'now'} ({kind}) took {taken:.1f} s"
        assert memory < 300 << 10, f"{root / 'now'} ({kind}) took {memory >> 10} MB"
        if len(coverage.known) > known and sum(map(len, files.values())) < 1 << 16 and len(corpus) < 3000:
            corpus.append((kind, files))
            counts["kept"] += 1
    shutil.rmtree(root)
    return {**counts, "lines": len(coverage.known)}


def write(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
    arguments = [argument for argument in sys.argv[1:] if argument != "--plain"]
    print(run(float(arguments[0]), int(arguments[1]) if len(arguments) > 1 else random.randrange(2**32), "--plain" in sys.argv))
