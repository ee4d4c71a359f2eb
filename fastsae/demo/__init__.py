"""``fastsae demo``: dictionaries, matches and spline codes of a real model's activations, in a few minutes on two cores.

all-MiniLM-L6-v2 reads Python's own documentation; two TopK SAEs (two seeds) learn its residual stream; their dictionaries are matched,
the MLP's spline codes counted and compared; every operation on the way is timed against plain torch. Without the model package the
same runs on synthetic superposition data. What is done is kept in the output folder and reused while its settings stay the same.
"""

from fastsae.demo.command import run
from fastsae.demo.settings import add_arguments

__all__ = ["add_arguments", "run"]
