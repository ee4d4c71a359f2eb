"""Studies: whole experiments that run in minutes, each one file that reads like the experiment.

    fastsae study                      # the list
    fastsae study recovery             # tables, plots, recovery.json and README.md, a page of it all, in studies/recovery/

A study is a module of this package. It has ``SIZES``, its parameters in two sizes, and ``run(study)``, the experiment; the first line of
its docstring is its line in the list::

    \"\"\"How often does a fair coin show heads?\"\"\"

    from fastsae.studies import Study

    SIZES = {  # "smoke" takes seconds; minutes: expected time on two cores
        "smoke": {"minutes": 0.01, "throws": 100},
        "default": {"minutes": 1, "throws": 1_000_000},
    }

    def run(study: Study) -> None:
        heads = torch.rand(study["throws"], generator=study.generator()) < 0.5
        study.table("heads", [{"throws": study["throws"], "share": float(heads.float().mean())}])

They need the extra ``studies``: ``pip install 'fastsae-kernels[studies]'``.
"""

from fastsae.studies._frame import Study, names, run_study

__all__ = ["Study", "names", "run_study"]
