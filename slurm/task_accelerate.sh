# What srun runs, for job.sh: one `accelerate launch` on each node, which starts the node's ranks.
TASKS_PER_NODE=1

task() {                                  # on every node
  trap "" USR1                            # it would kill the launcher; ranks install a handler once they can save
  trap : TERM                             # this shell outlives the launcher, to report how it ended
  export PET_SHUTDOWN_TIMEOUT=600         # seconds to save after a SIGTERM; the launcher's default is 30
  export PET_REDIRECTS=3                  # with --tee: a log per rank; all of them also in the job's log
  local ranks=$((SLURM_NNODES * RANKS_PER_NODE))                # on all nodes
  local options=(                         # an option left out would come from a file in the user's home
    --num_machines "$SLURM_NNODES" --num_processes "$ranks"
    --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD_NODE" --main_process_port "$PORT"
    --rdzv_backend static --same_network  # ranks meet on the first node
    --gpu_ids all                         # each rank takes its own
    --mixed_precision no                  # train.precision of the recipe decides
    --dynamo_backend no --num_cpu_threads_per_process 1         # the trainer sets its threads itself
    --max_restarts 0                      # a rank that fails ends the job
    --role rank --log_dir "$LOGS" --tee 3
  )
  # --multi_gpu means "several processes", on CPUs too; accelerate refuses it for a single one.
  [ "$ranks" -eq 1 ] || options+=(--multi_gpu)
  $CONTAINER "$PYTHON" -m accelerate.commands.launch "${options[@]}" --module shardstep.launch.train "$@"
  local code=$?
  exit $((code > 128 ? 1 : code))         # killed by a signal: another node failed, and its code counts
}
