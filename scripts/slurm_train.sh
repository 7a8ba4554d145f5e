#!/bin/bash
# Training over several nodes under Slurm: one task a GPU, ranks from srun. Submit with
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 scripts/slurm_train.sh configs/train/X.yaml engine.deepspeed=zero3
# A job that is about to end gets SIGTERM 120 s before; mmit saves and leaves with exit code 143, and the job queues itself
# again. A killed or requeued job goes on from its newest whole checkpoint (resume=auto).
#SBATCH --job-name mmit
#SBATCH --time 24:00:00
#SBATCH --cpus-per-task 8
#SBATCH --signal TERM@120
#SBATCH --requeue
#SBATCH --output %x-%j.log
set -u

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}

srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
  exec python scripts/train.py --config "$@" resume=auto
' train "$@"
code=$?
[ "$code" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
