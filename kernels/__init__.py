"""Triton device code and launchers, installed as ``fastsae.kernels``: no autograd, no dispatch, no policy."""

# pyright: basic, reportMissingImports=false

if __name__ != "fastsae.kernels":
    raise ImportError(f"this folder is the package fastsae.kernels and not {__name__!r}; install the checkout: pip install -e .")
