"""Benches: one file an operation, the floor and the best plain torch measured beside ours in the same run."""
