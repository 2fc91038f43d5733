"""Slurm jobs: submits, queries and supervises them."""
