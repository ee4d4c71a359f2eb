"""The commands of ``fastsae``, a file each: ``add_arguments(parser)`` and ``run(options) -> exit code``; ``fastsae/__main__.py`` calls them."""
