"""Submit a recipe to Slurm.

    shardstep submit RECIPE [section.key=value ...] --nodes 2 --ranks-per-node 4 --gpus-per-node 4 --time 4:00:00
    shardstep submit RECIPE --over optimizer.name=sgd,adam --over run.seed=0,1,2 --time 60     a job array, one task per point
    shardstep submit RECIPE ... --dry-run     prints the script
    shardstep submit RECIPE ... --follow      shows the job and the run's progress until it ends

The script needs only this Python on the nodes. A job that is preempted or reaches its time limit saves its state, and resumes
when Slurm starts it again; a cancelled job saves and ends.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

from shardstep.configs.components import neighbours
from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import Recipe
from shardstep.configs.text import count
from shardstep.launch.cli import run_script
from shardstep.launch.grid import file_name, names_of, points_of
from shardstep.launch.jobs.job_script import Job, render

_TIME = re.compile(r"\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2}")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
# Options that sbatch gets unchanged: their names here, and sbatch's.
_PASSED_ON = {
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "mem": "mem",
    "reservation": "reservation", "dependency": "dependency", "mail": "mail-user",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Reports a misspelt option with its neighbours and the list of all."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}")

    def check_unknown(self, unknown: list[str]) -> None:
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        names = [word.split("=")[0] for word in unknown if word.startswith("-")]
        if names:
            problems = [f"{name} is not an option; {neighbours(name, known)}" for name in names]
            raise InputError("\n".join([*problems, f"options: {', '.join(known)}"]))


def main(arguments: list[str]) -> int:
    """Submit the job or print its script; returns the exit code."""
    args = _parse(arguments)
    points = points_of(args.over)
    if not points and _ARRAY.fullmatch(args.array):  # then an index is a seed
        points = [[f"run.seed={index}"] for index in range(_last_index(args.array) + 1)]
    recipe = _check(args, points)
    has_folder = any(text.startswith("run.dir=") for text in args.overrides)
    base = f"run.dir={recipe.run.dir}" if has_folder else f"run.name={recipe.run.name}"
    tasks = [[*point, f"{base}-{name}"] for point, name in zip(points, names_of(points), strict=True)]
    return _submit(args, recipe, tasks, f"shardstep submit {shlex.join(arguments)}")


def submit_tasks(arguments: list[str], tasks: list[list[str]], command: str) -> int:
    """Submit a job array or print its script; returns the exit code.

    Args:
        arguments: of `shardstep submit`, without --over.
        tasks: the overrides that each adds, its run.dir included.
        command: that submits, for the script's head.

    Raises:
        InputError: something would fail later.
    """
    args = _parse(arguments)
    if args.over:
        raise InputError("--over belongs to the comparison: give it before --slurm, not in it")
    return _submit(args, _check(args, tasks), tasks, command)


def _submit(args: argparse.Namespace, recipe: Recipe, tasks: list[list[str]], command: str) -> int:
    script = render(_job(args, recipe, len(tasks)), [args.recipe, *args.overrides], tasks, command)
    if args.dry_run:
        print(script, end="")
        return 0

    job_id = _sbatch(script, Path(args.log_folder))
    where = f"{args.log_folder}/{file_name(recipe.run.name)}-{job_id}{'_*' if tasks else ''}.log"
    world = f"{count(args.nodes, 'node')} x {count(args.ranks_per_node, 'rank')}"
    size = f"{world}, {count(len(tasks), 'task')}" if tasks else world
    print(f"job {job_id}: {recipe.run.name} on {size}; log: {where}")
    if not args.follow:
        return 0
    from shardstep.launch.jobs.follow import follow

    return follow(job_id, None if tasks else Path(recipe.run.dir))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="shardstep submit", description="Submit a recipe to Slurm.", allow_abbrev=False)
    add, repeated = parser.add_argument, partial(parser.add_argument, action="append", default=[])
    add("recipe", help="a YAML file, or the name of a recipe")
    add("overrides", nargs="*", metavar="section.key=value", help="such as train.duration='2 epochs'")
    add("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    add("--ranks-per-node", type=int, metavar="R", help="ranks on each machine (default: one per GPU, or 1)")
    add("--gpus-per-node", type=int, default=0, metavar="G", help="GPUs on each machine (default: 0, trains on CPUs)")
    add("--cpus-per-rank", type=int, metavar="C", help="cores of each rank (default: 1 + data.workers)")
    add("--time", metavar="T", help="time limit: minutes, h:mm:ss, d-hh:mm:ss, ...; required")
    add("--launcher", choices=["torchrun", "accelerate", "srun"], default="torchrun", help="(default: torchrun)")
    add("--dry-run", action="store_true", help="print the script, submit nothing")
    add("--follow", action="store_true", help="show the job and the run's progress until it ends")
    repeated("--over", metavar="KEY=A,B,...", help="a job array with one task per value; several make a grid")
    some = "tasks of --over to run, and how many at once: 0-5%%2; without --over: seeds"
    add("--array", default="", metavar="RANGE", help=some)
    for name in ("partition", "account", "qos", "constraint", "reservation", "mem"):
        add(f"--{name}", metavar="NAME" if name != "mem" else "SIZE", help=f"sbatch's --{name}")
    add("--dependency", metavar="JOBS", help="sbatch's --dependency, such as afterok:123")
    add("--mail", metavar="ADDRESS", help="e-mail this address when the job ends, fails or is requeued")
    repeated("--setup", metavar="LINE", help="a shell line to run first: 'module load cuda'")
    add("--container", default="", metavar="COMMAND", help="runs ranks in a container: 'apptainer exec --nv image.sif'")
    add("--python", metavar="PATH", help="Python on the nodes (default: this one; with --container: python)")
    add("--log-folder", default="logs", metavar="DIR", help="(default: logs)")
    before = "seconds before the time limit to save at (default: 120)"
    add("--stop-before", type=int, default=120, metavar="S", help=before)
    add("--no-requeue", action="store_true", help="do not requeue a stopped job")
    repeated("--sbatch", metavar="OPTION", help="any other sbatch option, without dashes: gres=gpu:2")
    args, unknown = parser.parse_known_intermixed_args(arguments)
    parser.check_unknown(unknown)
    return args


def _check(args: argparse.Namespace, points: list[list[str]]) -> Recipe:
    """Check the options, and the recipe with each point's values; returns the recipe and fills in defaults.

    Raises:
        InputError: lists everything that would fail later.
    """
    problems = []
    if not args.time:
        problems.append("--time is required: the time limit of the job, such as 4:00:00")
    elif not _TIME.fullmatch(args.time):
        problems.append(f"--time {args.time!r} is not minutes, mm:ss, h:mm:ss, d-hh, d-hh:mm or d-hh:mm:ss")
    elif 2 * args.stop_before > seconds_of(args.time):
        problems.append(
            f"--stop-before {args.stop_before} s is more than half of --time {args.time}: the job would hardly train. Give "
            f"it more time, or a --stop-before that is just long enough for a step and a save"
        )
    if args.ranks_per_node is None:
        args.ranks_per_node = args.gpus_per_node or 1
    for name in ("nodes", "ranks_per_node", "cpus_per_rank", "stop_before"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            problems.append(f"--{name.replace('_', '-')} {getattr(args, name)} must be 1 or more")
    if args.gpus_per_node and args.ranks_per_node > args.gpus_per_node:
        both = f"--ranks-per-node {args.ranks_per_node} on --gpus-per-node {args.gpus_per_node}"
        problems.append(f"{both}: ranks cannot share a GPU")
    if args.array and not _ARRAY.fullmatch(args.array):
        problems.append(f"--array {args.array!r} is not of a form such as 0-5, 0,2,4 or 0-5%2")
    for text in args.sbatch:
        if not re.fullmatch(r"[a-z][a-z-]*(=.*)?", text):
            problems.append(f"--sbatch {text!r} is not of the form key or key=value, without leading dashes")
    if re.search(r"""["'\\*?\[$`]""", args.container):
        plain = "must be plain words: put anything that needs quotes into a script"
        problems.append(f"--container {args.container!r} {plain}")
    values = [*args.setup, *args.sbatch, *(getattr(args, name) or "" for name in _PASSED_ON), args.log_folder]
    problems += [f"{value!r} contains a line break" for value in values if "\n" in value or "\r" in value]
    if "%" in args.log_folder:
        problems.append(f"--log-folder {args.log_folder!r}: Slurm would replace the percent sign and what follows it")

    from shardstep.trainer.validate_recipe import validate_recipe

    recipes = []
    for point in points or [[]]:
        try:
            recipes.append(validate_recipe(load_recipe(args.recipe, [*args.overrides, *point])))
        except InputError as error:
            problems += [str(error)] if str(error) not in problems else []
    problems += dict.fromkeys(problem for recipe in recipes for problem in _problems_of_world(args, recipe))
    if points and args.array and _ARRAY.fullmatch(args.array) and _last_index(args.array) >= len(points):
        problems.append(f"--array {args.array}, but --over has {len(points)} points: 0 to {len(points) - 1}")
    if problems:
        raise InputError.from_problems("nothing was submitted", problems)
    # An array's tasks extend the name and folder of the recipe without a point's values.
    recipe = validate_recipe(load_recipe(args.recipe, args.overrides)) if points else recipes[0]
    if args.cpus_per_rank is None:
        args.cpus_per_rank = 1 + recipe.data.workers
    return recipe


def seconds_of(time: str) -> int:
    """Convert a time in one of Slurm's forms to seconds."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # d-hh, d-hh:mm, d-hh:mm:ss
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:  # minutes, mm:ss, hh:mm:ss
        hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _last_index(array: str) -> int:
    """Return the largest index of a range such as 0-5%2."""
    return max(map(int, re.findall(r"\d+", re.sub(r":\d+|%\d+", "", array))))


def _problems_of_world(args: argparse.Namespace, recipe: Recipe) -> list[str]:
    world_size, problems = args.nodes * args.ranks_per_node, []
    if recipe.train.world_size not in (None, world_size):
        problems.append(f"train.world_size={recipe.train.world_size}, but {args.nodes} x {args.ranks_per_node} ranks")
    size = recipe.train.global_batch_size
    if size != "full" and int(size) < world_size:
        problems.append(f"train.global_batch_size={size} is below the number of ranks, {world_size}")
    if recipe.train.device == "cuda" and not args.gpus_per_node:
        problems.append("train.device=cuda needs --gpus-per-node")
    if recipe.train.device == "cpu" and args.gpus_per_node:
        problems.append(f"train.device=cpu would leave the GPUs of --gpus-per-node {args.gpus_per_node} idle")
    return problems


def _job(args: argparse.Namespace, recipe: Recipe, num_points: int) -> Job:
    options: dict[str, str | None] = {to: getattr(args, name) for name, to in _PASSED_ON.items() if getattr(args, name)}
    if args.mail:
        options["mail-type"] = "END,FAIL,REQUEUE"
    options |= {key: value if equals else None for key, equals, value in (text.partition("=") for text in args.sbatch)}
    return Job(
        name=file_name(recipe.run.name),
        nodes=args.nodes,
        ranks_per_node=args.ranks_per_node,
        time=args.time,
        launcher=args.launcher,
        gpus_per_node=args.gpus_per_node,
        cpus_per_rank=args.cpus_per_rank,
        stop_before_s=args.stop_before,
        requeue=not args.no_requeue,
        options=options,
        setup=args.setup,
        container=args.container.split(),
        python=args.python or ("python" if args.container.split() else sys.executable),
        folder=str(Path.cwd()),
        log_folder=args.log_folder,
        array=args.array or f"0-{num_points - 1}",
    )


def _sbatch(script: str, log_folder: Path) -> str:
    """Submit a script; returns the job's id."""
    if not shutil.which("sbatch"):
        raise InputError(
            "there is no sbatch here: submit from a machine of the cluster, or print the script with --dry-run"
        )
    log_folder.mkdir(parents=True, exist_ok=True)  # if it is missing, Slurm drops the log silently
    result = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"Slurm rejected the job: {result.stderr.strip() or f'exit code {result.returncode}'}")
    if result.stderr.strip():
        print(result.stderr.strip(), file=sys.stderr)
    return result.stdout.strip().split(";")[0]


if __name__ == "__main__":
    run_script(main)
