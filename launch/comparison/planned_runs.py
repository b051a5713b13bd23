"""A comparison: which runs it has, which are still missing, and whether a folder holds the same one."""

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardstep.configs.errors import InputError
from shardstep.configs.files import check_output_file, write_atomically
from shardstep.configs.load import load_recipe, recipe_text
from shardstep.configs.schema import Recipe
from shardstep.launch.comparison.pool import Task, share_of_run, visible_gpus
from shardstep.launch.comparison.results import RunResult, Variant, optimizer_memory, read_result
from shardstep.launch.comparison.variants import (
    MOST_EXTENSIONS,
    SEARCH_SEED,
    Budget,
    best_rate,
    next_rate,
    rate_grid,
    read_variants,
)
from shardstep.trainer.checkpoints.lock import LOCK_NAME, is_held
from shardstep.trainer.distributed import launch_env

PLAN_NAME = "comparison.json"
_MEASURED = (
    "precision",
    "memory_format",
    "convolutions",
)  # of the section train: what `auto` chooses once for all runs
_CONVOLUTIONS_DEPEND_ON = (
    "model.",
    "data.",
    *(f"train.{key}" for key in ("precision", "memory_format", "compile", "device")),
)
_OVER = ("finished", "failed")  # states in which a run stays


@dataclass
class Comparison:
    """What is to be run, and where.

    Attributes:
        arguments: of every run: the recipe and the overrides that all variants share.
        variants: overrides by name.
        base_rates: of each variant, where the search begins; None without --tune.
        tune: the key that is searched, empty for none.
        settled: choices of `auto`, as overrides, once a step has been taken to measure them.
        rates: of each variant's runs with seeds, once its search is over.
        digests: of each variant's resolved recipe.
        measured: a variant that leaves something to `auto`, empty where none does.
        on_cpu: whether all train on the CPU, whatever else there is.
        share: of the machine, that the runs have while a budget of time passes; empty for budgets of steps and epochs.
        share_now: what further runs would have.
    """

    folder: Path
    command: str
    arguments: list[str]
    budget: Budget
    variants: dict[str, list[str]]
    seeds: int
    tune: str
    trials: int
    target: float | None
    base_rates: dict[str, float | None]
    digests: dict[str, str]
    settled: list[str]
    rates: dict[str, float]
    measured: str
    on_cpu: bool
    share: str
    share_now: str

    def search(self, name: str) -> dict[float, RunResult]:
        """The runs of a variant's search by rate: those of the first grid, and what extended it while an edge was best."""
        base = self.base_rates[name]
        if base is None:
            return {}
        found = {rate: self._outcome(name, f"rate-{rate:g}") for rate in rate_grid(base, self.trials)}
        for _ in range(MOST_EXTENSIONS):
            all_over = all(outcome.state in _OVER for outcome in found.values())
            extra = next_rate(losses_of(found), base) if all_over else None
            if extra is None:
                break
            found[extra] = self._outcome(name, f"rate-{extra:g}")
        return dict(sorted(found.items()))

    def rate(self, name: str) -> float | None:
        """The rate of a variant's runs: the best that was found, the recipe's own where none is."""
        if name in self.rates:
            return self.rates[name]
        return best_rate(losses_of(self.search(name))) or self.base_rates[name]

    def search_tasks(self) -> list[Task]:
        """The runs that the search still needs, as far as that is known."""
        return [
            self._task(name, f"rate-{rate:g}", [f"{self.tune}={rate:g}", f"run.seed={SEARCH_SEED}"])
            for name in self.variants
            for rate, outcome in self.search(name).items()
            if outcome.state not in _OVER
        ]

    def seed_tasks(self) -> list[Task]:
        """The runs with seeds that are still to be made: all variants with the first seed, then with the next.

        Those whose search has not come to its end wait for it.
        """
        tasks, names = [], self._searched()
        for seed in range(self.seeds):
            for name in names:
                if self._outcome(name, str(seed)).state not in _OVER:
                    rate = self.rate(name) if self.tune else None
                    tuned = [f"{self.tune}={rate:g}"] if rate is not None else []
                    tasks.append(self._task(name, str(seed), [*tuned, f"run.seed={seed}"]))
        return tasks

    def results(self) -> list[Variant]:
        """What there is now, of every variant."""
        return [
            Variant(
                name,
                overrides,
                self.rate(name),
                {seed: self._outcome(name, str(seed)) for seed in range(self.seeds)},
                self.search(name),
                self._memory(name),
            )
            for name, overrides in self.variants.items()
        ]

    def fix_rates(self) -> None:
        """Keep to the rates as they are now: runs of one variant must not differ in it."""
        found = {name: self.rate(name) for name in self._searched()}
        self.rates |= {name: rate for name, rate in found.items() if rate is not None}
        self.save()

    def _searched(self) -> list[str]:
        """The variants whose search has come to its end."""
        return [name for name in self.variants if all(run.state in _OVER for run in self.search(name).values())]

    def probe_task(self) -> Task | None:
        """A run of one step that measures what is left to `auto`, for all runs alike; None where nothing is."""
        if self.settled or not self.measured:
            return None
        place = self.folder / ".probe"  # a name that no variant can have
        overrides = [
            *self.arguments[1:],
            *self.variants[self.measured],
            "train.duration=1 steps",
            f"run.dir={place / 'run'}",
        ]
        return Task("one step to measure", [self.arguments[0], *overrides], place / "log")

    def settle(self) -> None:
        """Take what the probe has measured.

        Raises:
            InputError: it has come to no end.
        """
        place = self.folder / ".probe"
        outcome = read_result(place / "run", place / "log")
        if outcome.state != "finished":
            raise InputError(
                f"the first step of variant {self.measured} has failed: {outcome.reason}. See {place / 'log'}"
            )
        recipe = load_recipe(str(place / "run" / "config.yaml")).recipe
        self.settled = [f"train.{key}={getattr(recipe.train, key)}" for key in _MEASURED]
        self.save()

    def running(self) -> list[Path]:
        """Folders of runs that are alive, whoever has started them."""
        places = (place.parent for place in self.folder.glob(f"*/*/{LOCK_NAME}"))
        return sorted(place for place in places if is_held(place))

    def save(self) -> None:
        """Write down what is compared, so that a later command can see whether it means the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / PLAN_NAME, (json.dumps(self.record(), indent=1) + "\n").encode())

    def check_share(self) -> None:
        """Refuse to run more where a budget of time would mean another amount of work.

        Raises:
            InputError: it would.
        """
        if self.share_now != self.share:
            raise InputError(
                f"{self.folder}: a run of {self.budget.text} had {self.share} and would now have {self.share_now}: give as "
                f"many cores or GPUs and the same --parallel as before, or another --out"
            )

    def record(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {
            "command": self.command,
            "arguments": self.arguments,
            "budget": self.budget.text,
            "tune": self.tune,
            "trials": self.trials,
            "share": self.share,
            "settled": self.settled,
            "rates": self.rates,
            "digests": self.digests,
        }

    def log(self, name: str, run: str) -> Path:
        """Where what a run prints is kept."""
        return self.folder / name / f"{run}.log"

    def _outcome(self, name: str, run: str) -> RunResult:
        return read_result(self.folder / name / run, self.log(name, run))

    def _memory(self, name: str) -> float | None:
        runs = [str(seed) for seed in range(self.seeds) if self._outcome(name, str(seed)).last]
        return optimizer_memory(self.folder / name / runs[0]) if runs else None

    def _own_conditions(self, name: str) -> set[str]:
        """What a variant sets of all that the choice of train.convolutions depends on."""
        return {override for override in self.variants[name] if override.startswith(_CONVOLUTIONS_DEPEND_ON)}

    def _task(self, name: str, run: str, added: list[str]) -> Task:
        place = [f"run.dir={self.folder / name / run}", f"run.name={name}-{run}"]
        settled = self.settled
        if settled and self._own_conditions(name) != self._own_conditions(self.measured):
            settled = [override for override in settled if not override.startswith("train.convolutions=")]
        overrides = [*self.arguments[1:], *settled, *self.variants[name], *self.budget.overrides, *added, *place]
        return Task(f"{name} {run}", [self.arguments[0], *overrides], self.log(name, run))


def losses_of(search: dict[float, RunResult]) -> dict[float, float]:
    """The training loss at each rate, infinite where training failed."""
    return {rate: math.inf if outcome.train_loss is None else outcome.train_loss for rate, outcome in search.items()}


def prepare(args: argparse.Namespace, command: str) -> Comparison:
    """Check everything that can be checked before the first run.

    Raises:
        InputError: with all problems: of the options, of each variant's recipe, or because DIR holds another comparison.
    """
    problems = [
        f"--{name} {value} must be at least {least}"
        for name, least in (("seeds", 1), ("trials", 2), ("parallel", 1))
        if (value := getattr(args, name)) is not None and value < least
    ]
    if args.trials is not None and not args.tune:
        problems.append("--trials has no effect without --tune KEY, such as optimizer.lr")
    if args.target is not None and not 0 < args.target < 1:
        problems.append(f"--target {args.target:g} is an accuracy: between 0 and 1")
    if args.within is not None and not args.within > 0:
        problems.append(f"--within {args.within:g} is a number of minutes above 0")
    if args.slurm is not None and (args.parallel != 1 or args.within is not None):
        problems.append("--parallel and --within have no effect with --slurm: give --slurm '--array ...%P --time T'")
    folder = args.out or Path("runs") / f"compare-{load_recipe(args.recipe).recipe.run.name}"
    if args.doc and not args.doc.absolute().is_relative_to(folder.absolute()):
        try:
            check_output_file("--doc", args.doc)
        except InputError as error:
            problems.append(str(error))
    problems += _own_keys(args.overrides, "", bool(args.budget))
    if launch_env.is_launched():
        problems.append("compare starts processes itself: leave out torchrun, accelerate launch and srun")
    if problems:
        raise InputError.from_problems("nothing was begun", problems)

    budget, variants = Budget.parse(args.budget), read_variants(args.over, args.variants)
    recipes = {}
    refused: dict[str, list[str]] = {}  # why -> the variants: a key that does not exist is told once
    for name, overrides in variants.items():
        problems += [
            f"variant {name}: {problem}"
            for problem in _own_keys(overrides, args.tune if args.over else "", bool(args.budget))
        ]
        try:
            recipes[name] = _check([args.recipe, *args.overrides, *overrides, *budget.overrides])
        except InputError as error:
            refused.setdefault(str(error), []).append(name)
    problems += [f"variant {', '.join(names)}: {reason}" for reason, names in refused.items()]
    same = {tuple(name for name in recipes if recipes[name] == recipe): None for recipe in recipes.values()}
    problems += [f"variants {', '.join(names)} mean the same: give one of them" for names in same if len(names) > 1]
    base_rates: dict[str, float | None] = dict.fromkeys(variants)
    for name, recipe in recipes.items() if args.tune else ():
        rate = _number(recipe, args.tune)
        base_rates[name] = rate
        if rate is None:
            problems.append(f"variant {name}: --tune {args.tune} is no number above 0 in this recipe")
            continue
        for tried in (rate_grid(rate, args.trials or 3)[place] for place in (0, -1)):
            try:
                _check([args.recipe, *args.overrides, *variants[name], *budget.overrides, f"{args.tune}={tried:g}"])
            except InputError as error:
                problems.append(f"variant {name}, {args.tune}={tried:g} of the search: {error}")
    from shardstep.trainer.precision import is_measured

    measured = [name for name, recipe in recipes.items() if is_measured(recipe.train)]
    if measured and args.slurm is not None:
        problems.append(
            f"variant {measured[0]} leaves train.precision or train.memory_format to auto, and each job would measure for "
            "itself: give both, such as train.precision=bf16 train.memory_format=channels_last"
        )
    if not args.budget and len({recipe.train.duration for recipe in recipes.values()}) > 1:
        problems.append("variants differ in train.duration: give all the same --budget")
    if problems:
        raise InputError.from_problems("nothing was begun", problems)
    first = next(iter(recipes.values()))
    on_cpu = all(recipe.train.device == "cpu" for recipe in recipes.values())
    share = ""
    if any(recipe.train.max_wall_s for recipe in recipes.values()):
        gpus = [] if on_cpu else visible_gpus()
        share = "a job of Slurm" if args.slurm is not None else share_of_run(args.parallel, gpus)
    comparison = Comparison(
        folder=folder,
        command=command,
        arguments=[args.recipe, *args.overrides],
        budget=budget if args.budget else Budget(first.train.duration, ()),
        variants=variants,
        seeds=args.seeds,
        tune=args.tune or "",
        trials=args.trials or 3,
        target=args.target,
        base_rates=base_rates,
        digests={name: hashlib.sha256(recipe_text(recipe).encode()).hexdigest() for name, recipe in recipes.items()},
        settled=[],
        rates={},
        measured=measured[0] if measured else "",
        on_cpu=on_cpu,
        share=share,
        share_now=share,
    )
    _check_same_comparison(comparison)
    return comparison


def _own_keys(overrides: Sequence[str], tuned: str, has_budget: bool) -> list[str]:
    """What overrides say of keys that the comparison sets itself."""
    keys = {text.partition("=")[0] for text in overrides}
    folders = sorted(keys & {"run.dir", "run.name", "run.resume", "run.seed"})
    problems = (
        [f"{', '.join(folders)}: a comparison gives its runs folders and seeds itself; see --out and --seeds"]
        if folders
        else []
    )
    lengths = sorted(keys & {"train.duration", "train.max_wall_s"})
    if lengths and has_budget:
        problems.append(f"{', '.join(lengths)}: --budget says how long the runs are")
    if tuned in keys:
        problems.append(f"{tuned}: --tune searches it, so that the values given would not be used")
    return problems


def _check(arguments: list[str]) -> Recipe:
    from shardstep.trainer.optim.losses import build_objective
    from shardstep.trainer.validate import validate_recipe

    recipe = validate_recipe(load_recipe(arguments[0], arguments[1:]))
    if build_objective(recipe.loss, recipe.model).reconstructs:
        raise InputError(f"loss.name={recipe.loss['name']} has no accuracy to compare")
    return recipe


def _check_same_comparison(comparison: Comparison) -> None:
    """Refuse a folder of another comparison; take over what is settled in one that goes on.

    Raises:
        InputError: it is another.
    """
    path = comparison.folder / PLAN_NAME
    if not path.is_file():
        if comparison.folder.exists() and any(comparison.folder.iterdir()):
            raise InputError(f"--out {comparison.folder} holds other files than a comparison's: choose another folder")
        return
    try:
        saved, new = json.loads(path.read_text()), comparison.record()
        differences = [
            f"{key}: {saved[key]} -> {new[key]}" for key in ("budget", "tune", "trials") if saved[key] != new[key]
        ]
        differences += [
            f"variant {name} has other values than its runs there"
            for name, digest in new["digests"].items()
            if saved["digests"].get(name, digest) != digest and (comparison.folder / name).exists()
        ]
        if any((comparison.folder / name).exists() for name in saved["digests"]):
            comparison.share = saved.get("share", comparison.share)
        comparison.settled, comparison.rates = list(saved["settled"]), dict(saved["rates"])
        # Runs of variants that are left out this time stay known.
        comparison.digests = saved["digests"] | new["digests"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give another --out, or remove the file") from None
    if differences:
        raise InputError.from_problems(
            f"{comparison.folder} holds another comparison. Give another --out; more --seeds or variants may be added to it",
            differences,
        )


def _number(recipe: Recipe, key: str) -> float | None:
    """The value of a section.key in a recipe, if it is a number above 0."""
    section, _, name = key.partition(".")
    content = getattr(recipe, section, None)
    value = content.get(name) if isinstance(content, dict) else getattr(content, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None
