"""What several processes would get wrong in silence: gradients that nothing averages, statistics that are each process's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsae._core import processes


class Wrapped(nn.Module):
    """A module that knows whether DistributedDataParallel has wrapped it, which averages gradients only of its own forward."""

    _wrapped = False
    averaged = False
    """Whether who calls ``loss`` averages the gradients over the default group, as ``Trainer`` does."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> tuple[str, ...]:
        """DistributedDataParallel reads this of what it wraps, and of nothing else: how ``loss`` knows that it ought to be called by it."""
        self._wrapped = True
        return self.__dict__.get("_ignored", ())

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Sequence[str]) -> None:
        self.__dict__["_ignored"] = names

    def _refuse_past_wrapper(self, op: str, forwarding: bool) -> None:
        """RuntimeError in a group of several where this is wrapped and called past the wrapper; ``forwarding``: its forward may call."""
        running = forwarding and _running() is not None
        self._wrapped = self._wrapped or running
        if self._wrapped and not running:
            processes.refuse(
                op,
                "it was called past DistributedDataParallel, which averages gradients only of its own forward: wrap a module whose forward "
                "returns sae.loss(x).loss",
            )

    def _refuse_loss(self, op: str, statistics: str | None) -> None:
        """RuntimeError in a group of several for a training mode's loss that counts ``statistics``, or that nothing averages."""
        if self.training and processes.ranks() > 1:
            if torch.is_grad_enabled() and not self.averaged:
                self._refuse_past_wrapper(op, forwarding=True)
            if statistics is not None and (statistics != "dead features" or self._group() is None):
                refuse_statistics(op, statistics)

    def _refuse_selection(self, op: str) -> None:
        """RuntimeError in the forward of a wrapper, whose processes are to train one model, for a selection from a batch."""
        if _running() is not None:
            refuse_statistics(op, "BatchTopK's selection")

    def _group(self) -> Any:
        """Of the processes that train this as one model, each on rows of its own; None: no group is known."""
        if (wrapper := _running()) is not None:
            if wrapper._join_config.enable:
                processes.refuse("SAE.loss", "a process that has joined would not count features: give all as many batches, and no join()")
            return wrapper.process_group
        return torch.distributed.group.WORLD if self.averaged and processes.ranks() > 1 else None

    def _in_all(self, rows: int, fired: Tensor) -> tuple[int | Tensor, Tensor]:
        """The rows of a batch, and which features ``[F]`` fired, of all processes that train this as one model."""
        if (group := self._group()) is None:
            return rows, fired
        sums = torch.cat([fired, fired.new_ones(1)]).to(torch.int64)
        sums[-1] = rows
        torch.distributed.all_reduce(sums, group=group)
        return sums[-1], sums[:-1] != 0


def _running() -> Any:
    """The wrapper whose forward is running, or None; torch says so nowhere else."""
    return torch.nn.parallel.DistributedDataParallel._active_ddp_module  # pyright: ignore[reportPrivateUsage] # torch's own


def refuse_statistics(op: str, what: str) -> None:
    """RuntimeError in a group of several, where ``what`` a loss uses would be counted in each process for itself."""
    processes.refuse(
        op,
        f"{what} would be those of each process's rows: shard the SAE, over a mesh of 1 x n where each process has room for all of it "
        "(fastsae.distributed). AuxK goes with Trainer and a torch optimiser too, or in the forward of DistributedDataParallel. Where each "
        "process is to train a model of its own: optimiser.apply(sae.step_gradients(x)[1])",
    )
