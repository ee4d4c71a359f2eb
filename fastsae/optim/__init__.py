"""Optimisers over fused steps: exact dense Adam and signum from gradients that need not exist as matrices.

Adam, Signum                  optimisers of a ``fastsae.SAE`` or ``SAEs``; warmup_linear_decay: a schedule for them
adam_                         one step of Adam on one matrix
RowGradient, TiledGradient    the gradient of a weight as slots and rows, or as tiles made where they are read
"""

from fastsae.gradients import RowGradient, TiledGradient
from fastsae.ops.adam import adam_
from fastsae.optim.adam import Adam
from fastsae.optim.schedules import warmup_linear_decay
from fastsae.optim.signum import Signum

__all__ = ["Adam", "RowGradient", "Signum", "TiledGradient", "adam_", "warmup_linear_decay"]
