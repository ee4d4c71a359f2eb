"""What a host of ``test_hosts`` does: trains, one rank a host, and says what its network card has sent."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_runs import digest

from fastsae import SAE, AuxK, TopK
from fastsae.distributed import gathered, load_checkpoint, save_checkpoint, shard
from fastsae.optim import Adam

D, F, ROWS, TIMEOUT = 64, 1024, 512, 5.0


def main(rank: int, size: int, address: str, folder: Path, steps: int, card: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://{address}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    whole = SAE(D, F, TopK(16), aux=AuxK(32), dead_after=2000, seed=0)
    sae: Any = shard(whole, virtual=2, timeout=TIMEOUT)
    opt, start = Adam(sae, lr=1e-3, clip=1.0), 0
    if (folder / "manifest.json").exists():
        start = load_checkpoint(folder, sae, opt)["step"]
    counter = Path(f"/sys/class/net/{card}/statistics/tx_bytes")
    sent, wire, clock = sae.world.sent, int(counter.read_text()), time.monotonic()
    for step in range(start, steps):
        x = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(step))
        opt.step(x.chunk(size)[rank])
        if step == start + 9:
            seconds = (time.monotonic() - clock) / 10
            print(f"bytes of 10 steps: {sae.world.sent - sent} sent, {int(counter.read_text()) - wire} on the wire; {seconds:.3f} s a step")
        if step % 5 == 4:
            save_checkpoint(folder, sae, opt, {"step": step + 1})
        print(f"step {step}", flush=True)
    made = gathered(sae)
    if made is not None:
        print(f"end {digest(made.state_dict().values())}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
