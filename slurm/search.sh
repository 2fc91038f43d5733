#!/bin/bash
# Runs a search as a job:   sbatch slurm/search.sh search.yaml [key.path=value …]
# Edit the options below for your site, or give them on sbatch's command line, which overrides them.
#SBATCH --job-name=gptailor
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=5         # one rank per GPU, and room for the one that searches
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --signal=USR2@300           # seconds: the longest evaluation plus 60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gptailor-%j.log    # the ranks' own logs: logs/ of the run folder
##SBATCH --partition=… --account=…  (remove one # to enable)

# modules and environment for the nodes, if the login node's are not enough:
# module load openmpi
# source ~/gptailor/bin/activate

# One rank for each worker of a node, and one more on the first node, which searches. All nodes get
# room for that rank, because given only the total, Slurm would fill one node after the other.
ranks=${RANKS:-$((SLURM_JOB_NUM_NODES * (SLURM_NTASKS_PER_NODE - 1) + 1))}
unset SLURM_NTASKS_PER_NODE         # srun would apply it to the step, too

# The supervisor restarts the command after -- when a rank was killed, and requeues the job when its
# time is over. In a container: GPTAILOR='apptainer exec --nv image.sif gptailor'.
exec "${PYTHON:-python3}" -m gptailor.execution.supervisor -- \
  srun --mpi="${MPI_TYPE:-pmix}" --kill-on-bad-exit=1 --ntasks="$ranks" --distribution=cyclic \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    ${GPTAILOR:-gptailor} search "$@" --resume --executor mpi
