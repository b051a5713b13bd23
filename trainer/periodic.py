"""The periodic work of the loop, done by all ranks: evaluate, and save a checkpoint."""

from shardstep.configs.load import recipe_text
from shardstep.configs.recipe_code import as_kept
from shardstep.trainer.checkpoints import checkpoint
from shardstep.trainer.distributed.buffers import flatten_buffers
from shardstep.trainer.distributed.collectives import gather_buffers
from shardstep.trainer.evaluation import Evaluation
from shardstep.trainer.metrics import Stopwatch
from shardstep.trainer.optim.average import weights_to_evaluate
from shardstep.trainer.run import Run


def evaluate_now(run: Run, clock: Stopwatch) -> Evaluation | None:
    """Evaluate the model and write the result to metrics.jsonl; return None if the ranks are to stop. All ranks."""
    state, plan, metrics = run.state, run.plan, run.metrics
    state.evaluation_due = True
    began = clock.seconds()
    run.timer.mark("other")
    run.requests.restart()
    stop = run.requests.check(state.evaluation_s)  # all ranks; an evaluation that cannot finish in time does not begin
    evaluation = None if stop else run.evaluate()
    run.timer.mark("evaluation")
    spent_s = clock.seconds() - began
    state.evaluating_s += spent_s
    state.evaluation_s = max(state.evaluation_s, spent_s)  # an interrupted one would have taken longer
    if evaluation is None:
        return None
    state.evaluation_due = False
    state.wall_s = clock.seconds()
    if state.best is None or evaluation.best_by > state.best["score"]:
        scores = {name: score for name, score in evaluation.scores.items() if name != "top5"}
        state.best = {"step": state.progress.step, "score": evaluation.best_by} | scores
    run.patience.note(state, evaluation.scores)
    metrics.write_evaluation(state, plan.epochs(state.progress), evaluation)
    metrics.restart_clock()
    return evaluation


def save(run: Run, clock: Stopwatch) -> None:
    """Begin to save the current state; the next steps do not wait for the disk. All ranks."""
    state, metrics, accelerator = run.state, run.metrics, run.accelerator
    run.timer.mark("other")
    run.watchdog.beat(state.progress.step, "saving")
    metrics.gather_sums(state)  # all ranks
    state.wall_s = clock.seconds()
    buffers = gather_buffers(accelerator, flatten_buffers(state.module))  # all ranks
    if accelerator.is_main_process:
        metrics.sync()  # the lines up to this step are on disk before the checkpoint is
        recipe, evaluated = recipe_text(as_kept(run.recipe)), weights_to_evaluate(state)
        snapshot = checkpoint.take_snapshot(state, recipe, accelerator.num_processes, buffers, evaluated)
        run.saver.save(snapshot, lambda: run.watchdog.beat(state.progress.step, "saving"))
        run.requests.remove_files()
    run.requests.restart()
    metrics.restart_clock()
    run.timer.mark("checkpoint")
