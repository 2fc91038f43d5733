"""Jobs of Slurm: submitting, asking, watching over them."""
