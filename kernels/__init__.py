"""Triton device code and launchers, installed as ``fastsae.kernels``: no autograd, no dispatch, no policy."""

# pyright: basic, reportMissingImports=false

if __name__ != "fastsae.kernels":
    # In the checkout's root libraries (transformers) that look for a package of this name find the folder: it must import, and be empty.
    __path__ = []

    def __getattr__(name):
        raise AttributeError(f"this folder is the package fastsae.kernels and not {__name__!r}, got {name!r} asked of it; pip install -e .")
