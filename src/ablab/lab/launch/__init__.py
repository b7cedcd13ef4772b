"""Start runs: the processes of one run, a local pool, Slurm."""
