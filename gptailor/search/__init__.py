"""The search: genomes, operators, control arms, NSGA-II, the run."""
