"""Handles of packed weights go out of date with every change that torch tells of, whoever makes it and whatever view they are of."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae import SAE, SAEs, TopK
from fastsae import packed as module


def parameter(rows: int = 32, width: int = 12) -> nn.Parameter:
    p = nn.Parameter(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)))
    p.grad = torch.ones_like(p)
    return p


def step(cls: Any, **options: Any) -> Callable[[nn.Parameter], None]:
    def run(p: nn.Parameter) -> None:
        cls([p], lr=0.1, **options).step(lambda: 1.0)

    return run


def compiled_step(p: nn.Parameter) -> None:
    torch._dynamo.reset()
    optimizer = torch.optim.Adam([p], lr=0.1, fused=True)
    torch.compile(lambda: optimizer.step(), backend="eager")()


def without_gradients(change: Callable[[nn.Parameter], Any]) -> Callable[[nn.Parameter], Any]:
    return torch.no_grad()(change)


def inference(change: Callable[[nn.Parameter], Any]) -> Callable[[nn.Parameter], Any]:
    return torch.inference_mode()(change)


def other_memory(p: nn.Parameter) -> None:
    p.data = p.data * 2


def memory_that_comes_back(p: nn.Parameter) -> None:
    for _ in range(4):  # an allocator gives the block that the last round has freed
        p.data = p.data * 2


def other_view(p: nn.Parameter) -> None:
    p.data = p.data.flip(0) if p.dim() != 2 else p.data.as_strided(p.shape, (1, p.shape[0]))


def ours(p: nn.Parameter) -> None:
    fastsae.optim.adam_(p.detach(), torch.zeros_like(p), torch.zeros_like(p), torch.ones_like(p), step=1)


def swapped(p: nn.Parameter) -> None:
    p.grad = None
    torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 2))


def cleared(p: nn.Parameter) -> None:
    optimizer = torch.optim.Adam([p], lr=0.1, fused=True)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.zero_grad())  # runs before the one of all optimisers
    optimizer.step()


def loaded(p: nn.Parameter) -> None:
    holder = nn.Module()
    holder.p = p
    holder.load_state_dict({"p": torch.ones_like(p)})


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "Adam": step(torch.optim.Adam),
    **{
        f"{cls.__name__}_fused": step(cls, fused=True)
        for cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    },
    "Adam_fused_cleared": cleared,
    "Adam_foreach": step(torch.optim.Adam, foreach=True),
    **({"Adam_fused_compiled": compiled_step} if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else {}),  # compiles for seconds
    "LBFGS": step(torch.optim.LBFGS),
    "adam_": ours,
    "copy": without_gradients(lambda p: p.copy_(p * 2)),
    "view": without_gradients(lambda p: p.T.mul_(2)),
    "detached": lambda p: p.detach().mul_(2),
    "foreach": without_gradients(lambda p: torch._foreach_mul_([p], 2.0)),  # pyright: ignore[reportPrivateImportUsage]  (torch has no public one)
    "item": without_gradients(lambda p: p.__setitem__((3, slice(2, 4)), 7.0)),
    "init": lambda p: nn.init.normal_(p),
    "inference": inference(lambda p: p.mul_(2)),
    "inference_view": inference(lambda p: p[1:].mul_(2)),
    "other_memory": other_memory,
    "memory_that_comes_back": memory_that_comes_back,
    "other_view": other_view,
    "vector": lambda p: nn.utils.vector_to_parameters(torch.ones(p.numel()), [p]),
    "load": loaded,
    "swap": swapped,
}
VIEWS: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "itself": lambda p: p,
    "transposed": lambda p: p.T,
    "detached": lambda p: p.detach(),
    "columns": lambda p: p[:, 2:9],
    "rows": lambda p: p[3:],
    "of_inference_mode": lambda p: torch.inference_mode()(lambda: p.T)(),
}
# What gives the parameter other memory leaves views, and handles of them, with the old one.
MOVES = ("other_memory", "memory_that_comes_back", "other_view", "vector", "swap")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_every_handle_out_of_date(change: str) -> None:
    p = parameter()
    handles = [fastsae.pack(view(p)) for name, view in VIEWS.items() if change not in MOVES or name == "itself"]
    assert all(handle.fresh for handle in handles)
    CHANGES[change](p)
    for handle in handles:
        assert not handle.fresh
        with pytest.raises(ValueError, match=r"^encode_topk: the packed weights were changed since fastsae.pack"):
            fastsae.encode_topk(torch.zeros(1, handle.weight.shape[1]), handle, k=1)
        assert handle.refresh().fresh


def test_what_does_not_concern_a_handle_leaves_it_fresh() -> None:
    p, other = parameter(), parameter()
    frozen = parameter()
    frozen.grad = None
    handles = [fastsae.pack(view) for view in (p, p.T, frozen)]
    optimizer = torch.optim.Adam([other, frozen], fused=True)
    optimizer.step()
    sparse = nn.Embedding(4, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    torch.optim.SparseAdam(sparse.parameters()).step()
    (p * 2).sum().backward()
    assert all(handle.fresh for handle in handles)
    CHANGES["Adam_fused"](other)
    del optimizer, other
    assert all(handle.fresh for handle in handles)


def test_handles_are_not_kept_alive() -> None:
    before = len(module._live)
    handle = fastsae.pack(parameter())
    assert len(module._live) == before + 1
    del handle
    assert len(module._live) == before
    assert len(module._hooks) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda handle: pickle.loads(pickle.dumps(handle))])
def test_a_copy_has_to_be_packed_again(copied: Callable[[Any], Any]) -> None:
    handle = fastsae.pack(parameter())
    other = copied(handle)
    assert handle.fresh and not other.fresh and other.nbytes == 0
    del other
    assert copied(handle).refresh().fresh


def test_inference_tensors_are_refused() -> None:
    p = parameter()
    with torch.inference_mode():
        W = torch.ones(4, 3)
        for make in (lambda: fastsae.pack(W), lambda: fastsae.pack(W.T)):
            with pytest.raises(ValueError, match=r"^pack: W must not be an inference tensor"):
                make()
        assert fastsae.pack(p).fresh


def test_compiled_code_reads_the_weights() -> None:
    p, x = parameter(), torch.randn(3, 12)
    handle = fastsae.pack(p)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fastsae.encode_topk(x, handle, k=3).values, backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), fastsae.encode_topk(x, p, k=3).values)
            p.mul_(-1)


# ---------------------------------------------------------------- owners

X = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))


def checked(sae: SAE) -> Any:
    """The handle that ``sae`` encodes from, whose latents are those of the weights."""
    latents = sae.encode(X)
    handle, sae._packed = sae._packed, None
    sae._use_packed = False
    plain = sae.encode(X)
    sae._use_packed, sae._packed = True, handle
    assert torch.equal(latents.values, plain.values) and torch.equal(latents.indices, plain.indices)  # pyright: ignore[reportAttributeAccessIssue]
    return handle


@pytest.mark.parametrize("stacked", [False, True])
def test_an_sae_follows_its_weights(stacked: bool) -> None:
    sae = SAE(64, 300, TopK(5), seed=0)
    owner = SAEs([sae, SAE(64, 300, TopK(5), seed=1)]) if stacked else sae
    sae.packed = True
    owner.eval()

    def fused() -> None:
        for p in owner.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.Adam(owner.parameters(), lr=0.1, fused=True).step()

    def in_place() -> None:
        with torch.no_grad():
            owner.W_enc.mul_(-1)

    for change in (
        fused,
        in_place,
        lambda: owner.load_state_dict({name: tensor + 1 for name, tensor in owner.state_dict().items()}),
        lambda: owner.train().eval(),
        lambda: owner.double().float(),
        lambda: setattr(sae, "packed", True),
    ):
        handle = checked(sae)
        assert handle is not None and checked(sae) is handle
        change()
        assert checked(sae) is not handle
    assert checked(copy.deepcopy(sae)) is not checked(sae)


def test_parameters_made_in_inference_mode_are_not_packed() -> None:
    with torch.inference_mode():
        sae = SAE(64, 300, TopK(5), seed=0).eval()
        sae.packed = True
        assert checked(sae) is None
        sae.W_enc.mul_(-1)
        assert checked(sae) is None
