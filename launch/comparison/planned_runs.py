"""The plan of a comparison: its runs, those still missing, and whether a folder holds the same comparison."""

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardstep.configs.errors import InputError
from shardstep.configs.files import check_output_file, write_atomically
from shardstep.configs.load import load_recipe, recipe_text
from shardstep.configs.recipe_code import as_kept, code_of
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
    take_folds,
)
from shardstep.trainer.checkpoints.lock import LOCK_NAME, is_held
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.run_dir import RunDir

PLAN_NAME = "comparison.json"
_TRIALS = 3  # learning rates of a search, where --trials is not given
_MEASURED = ("precision", "memory_format", "convolutions")  # keys of train whose `auto` is resolved once for all runs
_CONVOLUTIONS_DEPEND_ON = (
    "model.", "data.", "train.precision", "train.memory_format", "train.compile", "train.device",
)  # fmt: skip


@dataclass
class Comparison:
    """What to run, and where.

    Attributes:
        arguments: of every run: the recipe and the overrides that all variants share.
        variants: overrides by name.
        folds: values of data.fold; each variant has a run for every seed and fold.
        has_validation: whether a variant holds samples out, or has a folder of them.
        tune: the key whose values are searched, such as optimizer.lr; empty for none.
        base_rates: learning rate at which each variant's search begins; None without --tune.
        digests: of each variant's recipe.
        auto_choices: what `auto` resolves to, as overrides, once a probe has measured it.
        rates: learning rate of each variant's runs by seed, once its search is over.
        probed: a variant that leaves keys to `auto`, empty if none does.
        on_cpu: whether all runs train on the CPU, even if there are GPUs.
        share: of the machine that each run has under a budget of time; empty for budgets of steps and epochs.
        share_now: what further runs would have.
    """

    folder: Path
    command: str
    arguments: list[str]
    budget: Budget
    variants: dict[str, list[str]]
    seeds: int
    folds: list[str]
    has_validation: bool
    tune: str
    trials: int
    target: float | None
    base_rates: dict[str, float | None]
    digests: dict[str, str]
    probed: str
    on_cpu: bool
    share: str
    share_now: str
    auto_choices: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)

    def search(self, name: str) -> dict[float, RunResult]:
        """Read a variant's search by learning rate: the first grid, and its extensions while an edge was best."""
        if (base := self.base_rates[name]) is None:
            return {}
        found = {rate: self._result(name, f"rate-{rate:g}") for rate in rate_grid(base, self.trials)}
        for _ in range(MOST_EXTENSIONS):
            extra = next_rate(losses_of(found), base)
            if extra is None or not all(run.is_over for run in found.values()):
                break
            found[extra] = self._result(name, f"rate-{extra:g}")
        return dict(sorted(found.items()))

    def rate(self, name: str) -> float | None:
        """Return the learning rate of a variant's runs: the best of the search, else the recipe's."""
        return self.rates.get(name) or best_rate(losses_of(self.search(name))) or self.base_rates[name]

    def search_tasks(self) -> list[Task]:
        """Return the runs that the search is known to need still."""
        return [
            self._task(name, f"rate-{rate:g}", [f"{self.tune}={rate:g}", f"run.seed={SEARCH_SEED}", *self._fold(0)])
            for name in self.variants
            for rate, run in self.search(name).items()
            if not run.is_over
        ]

    def seed_tasks(self) -> list[Task]:
        """Return the missing runs by seed of variants whose search is over: all with the first seed, then the next."""
        tasks, names = [], self._searched()
        for number in range(self.repeats):
            for name in names:
                if not self._result(name, str(number)).is_over:
                    rate = self.rate(name) if self.tune else None
                    tuned = [f"{self.tune}={rate:g}"] if rate is not None else []
                    seed = number // max(len(self.folds), 1)
                    tasks.append(self._task(name, str(number), [*tuned, f"run.seed={seed}", *self._fold(number)]))
        return tasks

    @property
    def repeats(self) -> int:
        """The number of runs of each variant: one for each seed and fold."""
        return self.seeds * max(len(self.folds), 1)

    def _fold(self, number: int) -> list[str]:
        """Return the override that holds out a fold in a variant's run; runs take the folds in turn."""
        return [f"data.fold={self.folds[number % len(self.folds)]}"] if self.folds else []

    def read_results(self) -> list[Variant]:
        """Read the present results of every variant."""
        variants = []
        for name, overrides in self.variants.items():
            runs = {number: self._result(name, str(number)) for number in range(self.repeats)}
            first = next((self.folder / name / str(seed) for seed, run in runs.items() if run.last), None)
            memory = optimizer_memory(first) if first else None
            variants.append(Variant(name, overrides, self.rate(name), runs, self.search(name), memory))
        return variants

    def fix_rates(self) -> None:
        """Fix the learning rates as they are now: runs of one variant must not differ in it."""
        self.rates |= {name: rate for name in self._searched() if (rate := self.rate(name)) is not None}
        self.save()

    def _searched(self) -> list[str]:
        """Return the variants whose search is over."""
        return [name for name in self.variants if all(run.is_over for run in self.search(name).values())]

    def probe_task(self) -> Task | None:
        """Return a run of one step that resolves `auto` once for all runs, or None if no variant has `auto`."""
        if self.auto_choices or not self.probed:
            return None
        place = self.folder / ".probe"  # a name that no variant can have
        overrides = [*self.variants[self.probed], *self._fold(0), "train.duration=1 steps", f"run.dir={place / 'run'}"]
        return Task("one step to measure", [*self.arguments, *overrides], place / "log")

    def resolve_auto(self) -> None:
        """Take over what the probe has measured.

        Raises:
            InputError: the probe did not finish.
        """
        folder, log = self.folder / ".probe" / "run", self.folder / ".probe" / "log"
        probe = read_result(folder, log)
        if probe.state != "finished":
            raise InputError(f"the first step of variant {self.probed} failed: {probe.reason}. See {log}")
        train = RunDir(folder).config.recipe.train
        self.auto_choices = [f"train.{key}={getattr(train, key)}" for key in _MEASURED]
        self.save()

    def running(self) -> list[Path]:
        """Return the folders of live runs, whoever started them."""
        places = (place.parent for place in self.folder.glob(f"*/*/{LOCK_NAME}"))
        return sorted(place for place in places if is_held(place))

    def save(self) -> None:
        """Save the plan, so that a later command can tell whether it is the same comparison."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / PLAN_NAME, (json.dumps(self.as_json(), indent=1) + "\n").encode())

    def check_share(self) -> None:
        """Check that a budget of time still means the same amount of work.

        Raises:
            InputError: further runs would have another share of the machine.
        """
        if self.share_now != self.share:
            raise InputError(
                f"{self.folder}: a run of {self.budget.text} had {self.share} and would now have {self.share_now}: give the "
                f"same number of cores or GPUs and the same --parallel as before, or another --out"
            )

    def as_json(self) -> dict[str, Any]:
        """Return the settings as comparison.json and results.json have them."""
        found = {"command": self.command, "arguments": self.arguments, "budget": self.budget.text, "tune": self.tune}
        found["folds"] = self.folds
        choices = {"settled": self.auto_choices, "rates": self.rates, "digests": self.digests}
        return found | {"trials": self.trials, "share": self.share} | choices

    def log(self, name: str, run: str) -> Path:
        """Return the path of a run's output."""
        return self.folder / name / f"{run}.log"

    def _result(self, name: str, run: str) -> RunResult:
        return read_result(self.folder / name / run, self.log(name, run))

    def _task(self, name: str, run: str, added: list[str]) -> Task:
        place = [f"run.dir={self.folder / name / run}", f"run.name={name}-{run}"]
        chosen = self.auto_choices
        if chosen:
            one, probed = (
                {text for text in self.variants[of] if text.startswith(_CONVOLUTIONS_DEPEND_ON)}
                for of in (name, self.probed)
            )
            chosen = [text for text in chosen if one == probed or not text.startswith("train.convolutions=")]
        overrides = [*chosen, *self.variants[name], *self.budget.overrides, *added, *place]
        return Task(f"{name} {run}", [*self.arguments, *overrides], self.log(name, run))


def losses_of(search: dict[float, RunResult]) -> dict[float, float]:
    """Return the loss at each learning rate that the search goes by, infinite where training failed."""
    return {rate: math.inf if run.search_loss is None else run.search_loss for rate, run in search.items()}


def prepare(args: argparse.Namespace, command: str) -> Comparison:
    """Check everything that can be checked before the first run.

    Raises:
        InputError: lists all problems of the options or of the variants' recipes; or DIR holds another comparison.
    """
    folder = args.out or Path("runs") / f"compare-{load_recipe(args.recipe).recipe.run.name}"
    problems = _option_problems(args, folder)
    if problems:
        raise InputError.from_problems("nothing was started", problems)
    from shardstep.trainer.formats.candidates import is_measured

    budget = Budget.parse(args.budget)
    over, folds = take_folds(args.over)
    has_one_variant = folds and not over and not args.variants
    variants = {"recipe": list[str]()} if has_one_variant else read_variants(over, args.variants)
    for fold in folds:
        _check([args.recipe, *args.overrides, f"data.fold={fold}"])
    added = [*budget.overrides, *(f"data.fold={fold}" for fold in folds[:1])]  # there may be no test set
    recipes, problems = _load_variants(args, added, variants)
    base_rates, tune_problems = _base_rates(args, added, variants, recipes)
    problems += tune_problems
    with_auto = [name for name, recipe in recipes.items() if is_measured(recipe.train)]
    if with_auto and args.slurm is not None:
        problems.append(
            f"variant {with_auto[0]} leaves train.precision or train.memory_format to auto, so each job would measure it "
            "again: give both, such as train.precision=bf16 train.memory_format=channels_last"
        )
    if not args.budget and len({recipe.train.duration for recipe in recipes.values()}) > 1:
        problems.append("variants differ in train.duration: give a --budget for all")
    if problems:
        raise InputError.from_problems("nothing was started", problems)
    on_cpu = all(recipe.train.device == "cpu" for recipe in recipes.values())
    share = ""
    if any(recipe.train.max_wall_s for recipe in recipes.values()):
        gpus = [] if on_cpu else visible_gpus()
        share = "a job of Slurm" if args.slurm is not None else share_of_run(args.parallel, gpus)
    comparison = Comparison(
        folder=folder,
        command=command,
        arguments=[args.recipe, *args.overrides],
        budget=budget if args.budget else Budget(next(iter(recipes.values())).train.duration, ()),
        variants=variants,
        seeds=args.seeds,
        folds=folds,
        has_validation=bool(folds) or any(recipe.data.validation or recipe.data.fold for recipe in recipes.values()),
        tune=args.tune or "",
        trials=args.trials or _TRIALS,
        target=args.target,
        base_rates=base_rates,
        digests={name: _digest(recipe) for name, recipe in recipes.items()},
        probed=with_auto[0] if with_auto else "",
        on_cpu=on_cpu,
        share=share,
        share_now=share,
    )
    _check_same_comparison(comparison)
    return comparison


def _digest(recipe: Recipe) -> str:
    """Return a sha256 of a recipe and of the code that it names."""
    code = code_of(recipe)
    content = recipe_text(as_kept(recipe)).encode() + (code.to_json() if code.names else b"")
    return hashlib.sha256(content).hexdigest()


def _option_problems(args: argparse.Namespace, folder: Path) -> list[str]:
    problems = [
        f"--{name} {value} must be at least {least}"
        for name, least in (("seeds", 1), ("trials", 2), ("parallel", 1))
        if (value := getattr(args, name)) is not None and value < least
    ]
    if args.trials is not None and not args.tune:
        problems.append("--trials has no effect without --tune KEY, such as optimizer.lr")
    if args.target is not None and not 0 < args.target < 1:
        problems.append(f"--target {args.target:g} must be an accuracy between 0 and 1")
    if args.within is not None and not args.within > 0:
        problems.append(f"--within {args.within:g} must be a number of minutes above 0")
    if args.slurm is not None and (args.parallel != 1 or args.within is not None):
        problems.append("--parallel and --within have no effect with --slurm: give --slurm '--array ...%P --time T'")
    if args.doc and not args.doc.absolute().is_relative_to(folder.absolute()):
        try:
            check_output_file("--doc", args.doc)
        except InputError as error:
            problems.append(str(error))
    problems += _reserved_keys(args.overrides, "", bool(args.budget))
    if launch_env.is_launched():
        problems.append("compare starts processes itself: leave out torchrun, accelerate launch, mpirun and srun")
    return problems


def _load_variants(
    args: argparse.Namespace, added: list[str], variants: dict[str, list[str]]
) -> tuple[dict[str, Recipe], list[str]]:
    """Return the validated recipe of each valid variant, and the problems of the others; `added` are overrides of all."""
    recipes, problems = {}, []
    refused: dict[str, list[str]] = {}  # reason -> variants: an unknown key is reported once
    for name, overrides in variants.items():
        reserved = _reserved_keys(overrides, args.tune if args.over else "", bool(args.budget))
        problems += [f"variant {name}: {problem}" for problem in reserved]
        try:
            recipes[name] = _check([args.recipe, *args.overrides, *overrides, *added])
        except InputError as error:
            refused.setdefault(str(error), []).append(name)
    problems += [f"variant {', '.join(names)}: {reason}" for reason, names in refused.items()]
    same = {tuple(name for name in recipes if recipes[name] == recipe): None for recipe in recipes.values()}
    problems += [f"variants {', '.join(names)} are the same: keep one of them" for names in same if len(names) > 1]
    return recipes, problems


def _base_rates(
    args: argparse.Namespace, added: list[str], variants: dict[str, list[str]], recipes: dict[str, Recipe]
) -> tuple[dict[str, float | None], list[str]]:
    """Return where each variant's search begins, None without --tune, and the problems of its first grid's edges."""
    base_rates, problems = dict[str, float | None].fromkeys(variants), list[str]()
    for name, recipe in recipes.items() if args.tune else ():
        rate = base_rates[name] = _positive_number(recipe, args.tune)
        if rate is None:
            problems.append(f"variant {name}: --tune {args.tune} is not a number above 0 in this recipe")
            continue
        grid = rate_grid(rate, args.trials or _TRIALS)
        for edge in (grid[0], grid[-1]):
            try:
                _check([args.recipe, *args.overrides, *variants[name], *added, f"{args.tune}={edge:g}"])
            except InputError as error:
                problems.append(f"variant {name}, {args.tune}={edge:g} of the search: {error}")
    return base_rates, problems


def _reserved_keys(overrides: Sequence[str], tuned: str, has_budget: bool) -> list[str]:
    """Return a problem for each override of a key that the comparison sets itself."""
    keys, problems = {text.partition("=")[0] for text in overrides}, []
    folders = sorted(keys & {"run.dir", "run.name", "run.resume", "run.seed"})
    if folders:
        problems.append(f"{', '.join(folders)}: a comparison sets its runs' folders and seeds; see --out and --seeds")
    lengths = sorted(keys & {"train.duration", "train.max_wall_s"})
    if lengths and has_budget:
        problems.append(f"{', '.join(lengths)}: --budget sets the length of the runs")
    if tuned in keys:
        problems.append(f"{tuned}: --tune searches it, so the values given would not be used")
    return problems


def _check(arguments: list[str]) -> Recipe:
    from shardstep.trainer.optim.losses import build_objective
    from shardstep.trainer.validate_recipe import validate_recipe

    recipe = validate_recipe(load_recipe(arguments[0], arguments[1:]))
    if build_objective(recipe.loss, recipe.model).reconstructs:
        raise InputError(f"loss.name={recipe.loss['name']} has no accuracy to compare")
    return recipe


def _check_same_comparison(comparison: Comparison) -> None:
    """Check that the folder holds this comparison or nothing; take over the choices of an earlier command."""
    path = comparison.folder / PLAN_NAME
    if not path.is_file():
        if comparison.folder.exists() and any(comparison.folder.iterdir()):
            foreign = "holds files that are not a comparison's: choose another folder"
            raise InputError(f"--out {comparison.folder} {foreign}")
        return
    try:
        saved, new = json.loads(path.read_text()), comparison.as_json()
        saved.setdefault("folds", [])  # by earlier versions
        changed = [key for key in ("budget", "tune", "trials", "folds") if saved[key] != new[key]]
        differences = [f"{key}: {saved[key]} -> {new[key]}" for key in changed]
        differences += [
            f"variant {name} differs from its runs there"
            for name, digest in new["digests"].items()
            if saved["digests"].get(name, digest) != digest and (comparison.folder / name).exists()
        ]
        if any((comparison.folder / name).exists() for name in saved["digests"]):
            comparison.share = saved.get("share", comparison.share)
        comparison.auto_choices, comparison.rates = list(saved["settled"]), dict(saved["rates"])
        comparison.digests = saved["digests"] | new["digests"]  # keeps variants that this command leaves out
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give another --out, or remove the file") from None
    if differences:
        remedy = "Give another --out; more --seeds or variants are fine"
        raise InputError.from_problems(f"{comparison.folder} holds another comparison. {remedy}", differences)


def _positive_number(recipe: Recipe, key: str) -> float | None:
    """Return the value of section.key in a recipe if it is a number above 0."""
    section, _, name = key.partition(".")
    content = getattr(recipe, section, None)
    value = content.get(name) if isinstance(content, dict) else getattr(content, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None
