# What srun runs, for job.sh: one Slurm task per rank, without another launcher.
TASKS_PER_NODE=$RANKS_PER_NODE

task() {                                  # once for each rank
  trap "" USR1                            # it would kill python before the handler is installed
  trap : TERM                             # this shell outlives the rank, to report how it ended
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID         # what torchrun would set
  export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$RANKS_PER_NODE
  export MASTER_ADDR=$HEAD_NODE MASTER_PORT=$PORT             # where the ranks find each other
  # a log per rank; all of them also in the job's log. tee must outlive the rank, or its last lines are lost
  $CONTAINER "$PYTHON" -m shardstep.launch.train "$@" 2>&1 | (trap "" TERM INT; exec tee -a "$LOGS/rank-$RANK.log")
  exit "${PIPESTATUS[0]}"
}
