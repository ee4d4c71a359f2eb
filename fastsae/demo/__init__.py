"""``fastsae demo``: dictionaries of real models, what their features say, matches, spline codes and speed, in minutes on two cores.

SmolLM2-135M and all-MiniLM-L6-v2 read Python's own documentation; two TopK SAEs (two seeds) learn the residual stream of each. Without
their packages the same runs on synthetic superposition data. ``demo/index.html`` tells what came of it.
"""

from fastsae.demo.command import add_arguments, run

__all__ = ["add_arguments", "run"]
