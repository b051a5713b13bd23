# What all job scripts have in common: run `task` with srun, and when it has ended, start the job again or end it.
# Sourced at the end of torchrun.sbatch, accelerate.sbatch, srun.sbatch and sweep.sbatch with their arguments; `shardstep
# submit` copies it into what it submits.

[ $# -gt 0 ] || { echo "error: no recipe: sbatch SCRIPT RECIPE [section.key=value ...]" >&2; exit 2; }

# --- what tasks need to know -------------------------------------------------------------------------------------------
# The plain id of an array's last task means the whole array; each task has a name of its own.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} JOB=${JOB:-$SLURM_JOB_ID}
# Slurm's controller may be restarting.
patiently() { local try; for try in 1 2 3 4 5; do "$@" && return; sleep 10; done; return 1; }
job_says() { SLURM_TIME_FORMAT=standard patiently scontrol -o show job "$JOB" | grep -oP "(?<=\b$1=)[^ ]+" | head -n 1; }
seconds() { date -d "$1" +%s 2>/dev/null; }                     # since the epoch; nothing for "Unknown" or "N/A"

HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
[ -n "$HEAD_NODE" ] || { echo "error: scontrol names no node of this job" >&2; exit 2; }
PORT=$((20000 + SLURM_JOB_ID % 12000))                          # two jobs on one node get two ports
LOGS=${LOG_FOLDER:-.}/$SLURM_JOB_NAME-$JOB
mkdir -p "$LOGS" && LOGS=$(cd "$LOGS" && pwd) || exit 2
export SLURM_RESTART_COUNT=$(job_says Restarts)                 # not what the submitting shell may have had
export SLURM_JOB_START_TIME=$(seconds "$(job_says StartTime)")  # Slurm itself tells these from version 23.02 on
export SLURM_JOB_END_TIME=$(seconds "$(job_says EndTime)")      # the trainer plans with them: it saves in time
export SHARDSTEP_STOPPED_FILE=$LOGS/stopped                     # rank 0 writes here that it has saved on request
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}             # srun does not take it from sbatch (22.05 and later)
export HEAD_NODE PORT LOGS RANKS_PER_NODE PYTHON CONTAINER
export -f task

# --- run ---------------------------------------------------------------------------------------------------------------
rm -f "$SHARDSTEP_STOPPED_FILE"
trap : TERM                                                     # this shell sees how the ranks end, then ends itself
echo "job $JOB, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NNODES x $RANKS_PER_NODE ranks, from $HEAD_NODE on"
recipe=$1; shift
# One rank that fails ends all at once; when one is done, the others have 5 minutes. Numbers are given, because the job may
# have been given another number of nodes since it was submitted; the world must be of that size.
srun --nodes="$SLURM_NNODES" --ntasks="$((SLURM_NNODES * TASKS_PER_NODE))" --ntasks-per-node="$TASKS_PER_NODE" \
  --kill-on-bad-exit=1 --wait=300 bash -c 'task "$@"' task \
  "$recipe" "train.world_size=$((SLURM_NNODES * RANKS_PER_NODE))" "$@"
code=$?

# --- again, or the end -------------------------------------------------------------------------------------------------
state=$(job_says JobState) reason=$(job_says Reason) preempted=$(job_says PreemptTime)
# Who is asked to end before it has come to listen leaves no word, and was stopped all the same.
if [ "$code" -ne 0 ] && [ ! -s "$SHARDSTEP_STOPPED_FILE" ] && { [ "${preempted:-None}" != None ] || [ "$reason" = TimeLimit ]; }
then echo "0 signal" > "$SHARDSTEP_STOPPED_FILE"; fi
[ -s "$SHARDSTEP_STOPPED_FILE" ] || exit "$code"                # finished, or failed

read -r steps by < "$SHARDSTEP_STOPPED_FILE"                    # steps that this start has done; who asked it to stop
unfinished=$((code ? code : 85))                                # a job that depends on this one must not start
if [ "$by" = person ]; then
  echo "job $JOB: stopped by the file STOP and saved; not requeued"
  exit "$unfinished"
elif [ "${SHARDSTEP_REQUEUE:-yes}" != yes ]; then
  echo "job $JOB: stopped and saved; not requeued, as asked for"
  exit "$unfinished"
elif [ "$state" != RUNNING ] && [ "$reason" != TimeLimit ]; then  # after scancel a requeue would bring the job back to life
  echo "job $JOB: stopped and saved; not requeued from here, because Slurm is ending it ($state, $reason)"
  exit "$unfinished"
fi
# Three starts in a row that had their time, and made no new step: what stopped them will stop the next.
if [ "$steps" -gt 0 ]; then rm -f "$LOGS/idle"; elif [ "${preempted:-None}" = None ]; then echo "no step" >> "$LOGS/idle"; fi
if [ -e "$LOGS/idle" ] && [ "$(wc -l < "$LOGS/idle")" -ge 3 ]; then
  echo "failed: job $JOB was started 3 times without a new step; not requeued. Give it more --time" >&2
  exit 75
fi
if patiently scontrol requeue "$JOB"; then
  echo "job $JOB: stopped and saved; requeued"
  sleep 120                                                     # until Slurm ends this shell
else
  echo "failed: job $JOB was stopped and saved, but could not be requeued; submit it again to go on" >&2
fi
exit "$unfinished"
