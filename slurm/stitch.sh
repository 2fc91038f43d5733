#!/bin/bash
# Writes a model as a job on one node:   sbatch slurm/stitch.sh RUN --point POINT OUT
#SBATCH --job-name=gptailor-stitch
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
##SBATCH --mem=64G                  # the model, as it is loaded once (--no-verify leaves it out)
#SBATCH --time=01:00:00
#SBATCH --output=gptailor-stitch-%j.log
##SBATCH --partition=… --account=…  (one # less, and it counts)

# module load …
# source ~/gptailor/bin/activate

exec ${GPTAILOR:-gptailor} stitch "$@"
