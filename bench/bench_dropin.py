"""Peer libraries before and after ``fastsae.accelerate``, in the usual shapes (B, D, F, k): TopK, the same weights and rows.

Rows of a library: ``fastsae.encode`` (sparse; also with weights packed once, where it takes a handle), its own ``encode`` accelerated
(what its API returns, dense where that is dense), and its training step. The other side is the library as it is. Peers are measured where
they are installed (`make peers`); a warning says which are not. On a quiet machine: ``fastsae bench dropin``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastsae
from bench import peers, training
from bench.harness import name


@pytest.mark.parametrize("way", ["sparse", "sparse, packed once", "as it returns"])
@pytest.mark.parametrize("library", peers.PEERS)
@pytest.mark.parametrize("shape", training.SHAPES, ids=name)
def test_encode(shape: tuple[int, ...], library: str, way: str, compare: Callable[..., None]) -> None:
    peer = peers.PEERS[library]
    start, x = training.inputs(shape)
    theirs, mine = (training.build(library, peer.sae, start) for _ in range(2))
    if theirs is None:
        pytest.skip(f"{library} is not installed")
    fastsae.accelerate(mine)
    packed = None
    if way == "sparse, packed once":
        if peer.encoder is None:
            pytest.skip(f"{library} takes no handle")
        packed = fastsae.pack(peer.encoder(mine))

    def encode() -> object:
        if way == "as it returns":
            return peer.encode(mine, x)
        return fastsae.encode(mine, x) if packed is None else fastsae.encode(mine, x, packed=packed)

    with torch.no_grad():
        others = {f"{library} as it is": lambda: peer.encode(theirs, x)}
        compare(f"{library} encode, {way}", name(shape), encode, others, lambda: peers.check_encode(peer, theirs, mine, x))


@pytest.mark.parametrize("library", peers.PEERS)
@pytest.mark.parametrize("shape", training.SHAPES, ids=name)
def test_step(shape: tuple[int, ...], library: str, compare: Callable[..., None]) -> None:
    make = peers.PEERS[library].training
    start, x = training.inputs(shape)
    theirs, mine = (training.build(library, make, start) for _ in range(2))
    if theirs is None or mine is None:
        pytest.skip(f"{library} is not installed")
    fastsae.accelerate(mine.target)
    # The first step of what is timed is the one compared: two trainers are enough memory.
    others = {f"{library} as it is": lambda: theirs.step(x)}
    compare(f"{library} training step", name(shape), lambda: mine.step(x), others, lambda: peers.check_step(mine, theirs, x, start.lr))
