"""An accelerated object of a library that trains in several processes, in two of them."""

from __future__ import annotations

from pathlib import Path

from peers import load
from training_runs import both

load("sparsify", "eai-sparsify")

SPARSIFY = """
    import sys, torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel as DDP
    import fastsae
    from peers import load

    sparsify = load("sparsify", "eai-sparsify")
    SparseCoder, SparseCoderConfig = sparsify.SparseCoder, sparsify.SparseCoderConfig

    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    def trained(fast):
        torch.manual_seed(0)
        coder = SparseCoder(16, SparseCoderConfig(num_latents=64, k=4))
        if fast:
            fastsae.accelerate(coder)
        wrapped, opt = DDP(coder), torch.optim.Adam(coder.parameters(), lr=1e-3)
        g = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = torch.randn(40, 16, generator=g)[rank::2]
            wrapped(x=x, dead_mask=None).fvu.backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            opt.step()
            opt.zero_grad()
        return coder
    ours, theirs = trained(True), trained(False)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        both = [torch.empty_like(a) for _ in range(2)]
        dist.all_gather(both, a.detach().contiguous())
        assert torch.equal(*both)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    try:
        fastsae.patch.sparsify.train_step(ours, torch.optim.Adam(ours.parameters()), torch.randn(8, 16))
    except RuntimeError as error:
        assert "train_step: in a process group of 2" in str(error), error
    else:
        raise AssertionError("two models without a word")
    dist.destroy_process_group()
"""


def test_an_accelerated_coder_in_a_group(tmp_path: Path) -> None:
    both(SPARSIFY, tmp_path)
