#!/bin/bash
# A search as a job:   sbatch slurm/search.sh search.yaml [key.path=value …]
# Edit what follows for your site, or name it on sbatch's command line, which comes first.
#SBATCH --job-name=gptailor
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=5         # one rank for each GPU, and room for one that searches
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --signal=USR2@300           # seconds: the longest evaluation and 60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gptailor-%j.log    # what each rank does: logs/ of the run folder
##SBATCH --partition=… --account=…  (one # less, and it counts)

# modules and environment of the nodes, if the login node's are not enough:
# module load openmpi
# source ~/gptailor/bin/activate

# As many ranks on each node as evaluate there, and one more on the first, which searches. Nodes get
# room for it alike, as Slurm would fill one node after the other if it were told the sum.
ranks=${RANKS:-$((SLURM_JOB_NUM_NODES * (SLURM_NTASKS_PER_NODE - 1) + 1))}
unset SLURM_NTASKS_PER_NODE         # srun would want it of the step, too

# The supervisor starts the line behind -- again when a rank was killed, and requeues the job when
# its time is over. In a container: GPTAILOR='apptainer exec --nv image.sif gptailor'.
exec "${PYTHON:-python3}" -m gptailor.execution.supervisor -- \
  srun --mpi="${MPI_TYPE:-pmix}" --kill-on-bad-exit=1 --ntasks="$ranks" --distribution=cyclic \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    ${GPTAILOR:-gptailor} search "$@" --resume --executor mpi
