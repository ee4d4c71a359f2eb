"""The commands of ``fastsae``, a file each: ``add_arguments(parser)``, ``run(options) -> exit code``, and ``REFUSED``: the exceptions that
speak of wrong input, which ``fastsae/__main__.py`` says in a line."""
