# What srun runs, for job.sh: one torchrun on each node, which starts the node's ranks.
TASKS_PER_NODE=1

task() {                                  # on every node
  trap "" USR1                            # it would kill torchrun; ranks install a handler once they can save
  trap : TERM                             # this shell outlives the launcher, to report how it ended
  export PET_SHUTDOWN_TIMEOUT=600         # seconds to save after a SIGTERM; torchrun's default is 30
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"  # unset, torchrun warns; a rank uses at most its share of these
  local options=(
    --nnodes="$SLURM_NNODES" --nproc-per-node="$RANKS_PER_NODE"
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD_NODE:$PORT"      # where the nodes find each other
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"         # a new name for each start of the job
    --max-restarts=0                                            # a rank that fails ends the job
    --role=rank --log-dir="$LOGS" --redirects=3 --tee=3         # a log per rank; all of them also in the job's log
  )
  $CONTAINER "$PYTHON" -m torch.distributed.run "${options[@]}" -m shardstep.launch.train "$@"
  local code=$?
  exit $((code > 128 ? 1 : code))         # killed by a signal: another node failed, and its code counts
}
