"""The MPI program: rank 0 and the ranks that evaluate."""
