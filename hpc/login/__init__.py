"""The login node: the command line, the settings, Slurm, what a person sees."""
