# What all job scripts have in common: run `task` with srun, then requeue the job or end it. torchrun.sbatch,
# accelerate.sbatch and srun.sbatch source it with their arguments; `shardstep submit` copies it into what it submits.

[ $# -gt 0 ] || { echo "error: no recipe: sbatch SCRIPT RECIPE [section.key=value ...]" >&2; exit 2; }

# --- what the tasks need ------------------------------------------------------------------------------------------------
# The plain id of an array's last task means the whole array, so each task goes by ARRAY_TASK, such as 12_3.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} JOB=${JOB:-$SLURM_JOB_ID}
# Slurm's controller may be restarting.
retry() { local try; for try in 1 2 3 4 5; do "$@" && return; sleep 10; done; return 1; }
job_field() { SLURM_TIME_FORMAT=standard retry scontrol -o show job "$JOB" | grep -oP "(?<=\b$1=)[^ ]+" | head -n 1; }
seconds() { date -d "$1" +%s 2>/dev/null; }                     # since the epoch; nothing for "Unknown" or "N/A"

HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
[ -n "$HEAD_NODE" ] || { echo "error: scontrol lists no node for this job" >&2; exit 2; }
PORT=$((20000 + SLURM_JOB_ID % 12000))                          # two jobs on one node get different ports
LOGS=${LOG_FOLDER:-.}/$SLURM_JOB_NAME-$JOB
mkdir -p "$LOGS" && LOGS=$(cd "$LOGS" && pwd) || exit 2
export SLURM_RESTART_COUNT=$(job_field Restarts)                # not the submitting shell's value
export SLURM_JOB_START_TIME=$(seconds "$(job_field StartTime)") # Slurm sets these from version 23.02 on
export SLURM_JOB_END_TIME=$(seconds "$(job_field EndTime)")     # the trainer uses them to save in time
export SHARDSTEP_STOPPED_FILE=$LOGS/stopped                     # rank 0 writes here when it has saved on request
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}             # srun does not inherit it from sbatch (22.05 and later)
export HEAD_NODE PORT LOGS RANKS_PER_NODE PYTHON CONTAINER
export -f task

# --- run ---------------------------------------------------------------------------------------------------------------
rm -f "$SHARDSTEP_STOPPED_FILE"
trap : TERM                                                     # this shell waits for the ranks to end, then ends itself
echo "job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NNODES x $RANKS_PER_NODE ranks, first node $HEAD_NODE"
recipe=$1; shift
# If one rank fails, srun ends all at once; when one is done, the others have 5 minutes. The numbers are explicit because the
# job's number of nodes may have changed since it was submitted; the world must be of that size. After sbatch --export=NONE
# srun would not pass on what is exported above, such as `task`.
srun --nodes="$SLURM_NNODES" --ntasks="$((SLURM_NNODES * TASKS_PER_NODE))" --ntasks-per-node="$TASKS_PER_NODE" \
  --export=ALL --kill-on-bad-exit=1 --wait=300 bash -c 'task "$@"' task \
  "$recipe" "train.world_size=$((SLURM_NNODES * RANKS_PER_NODE))" "$@"
code=$?

# --- requeue, or end ---------------------------------------------------------------------------------------------------
state=$(job_field JobState) reason=$(job_field Reason) preempted=$(job_field PreemptTime)
# Ranks that were signalled before they installed a handler wrote no file, but were stopped all the same.
if [ "$code" -ne 0 ] && [ ! -s "$SHARDSTEP_STOPPED_FILE" ] && { [ "${preempted:-None}" != None ] || [ "$reason" = TimeLimit ]; }
then echo "0 signal" > "$SHARDSTEP_STOPPED_FILE"; fi
[ -s "$SHARDSTEP_STOPPED_FILE" ] || exit "$code"                # finished, or failed

read -r steps by < "$SHARDSTEP_STOPPED_FILE"                    # steps taken since this start; who asked it to stop
unfinished=$((code ? code : 85))                                # jobs that depend on this one must not start
if [ "$by" = person ]; then
  echo "job $JOB: stopped by the file STOP and saved; not requeued"
  exit "$unfinished"
elif [ "${SHARDSTEP_REQUEUE:-yes}" != yes ]; then
  echo "job $JOB: stopped and saved; not requeued, as requested"
  exit "$unfinished"
elif [ "$state" != RUNNING ] && [ "$reason" != TimeLimit ]; then  # a requeue would revive a job after scancel
  echo "job $JOB: stopped and saved; not requeued from here, because Slurm is ending it ($state, $reason)"
  exit "$unfinished"
fi
# Three starts in a row had their time and took no new step: what stopped them will stop the next one too.
if [ "$steps" -gt 0 ]; then rm -f "$LOGS/idle"; elif [ "${preempted:-None}" = None ]; then echo "no step" >> "$LOGS/idle"; fi
if [ -e "$LOGS/idle" ] && [ "$(wc -l < "$LOGS/idle")" -ge 3 ]; then
  echo "failed: job $JOB was started 3 times without a new step; not requeued. Give it more --time" >&2
  exit 75
fi
if retry scontrol requeue "$JOB"; then
  echo "job $JOB: stopped and saved; requeued"
  sleep 120                                                     # until Slurm ends this shell
else
  echo "failed: job $JOB was stopped and saved, but could not be requeued; submit it again to resume" >&2
fi
exit "$unfinished"
