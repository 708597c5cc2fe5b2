"""The commands, a module each: ``HELP``, ``add_arguments(parser)``, ``run(parsed, rest)``; none loads torch before."""
