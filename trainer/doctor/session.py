"""A preflight of one process of a launch: a recipe in, the findings of all processes out.

Every process of the launch runs this. They exchange reports through a store that needs no world; unless an error prevents it,
they bring up a world, measure it, and take one step of the recipe. Every wait has a timeout; every failure becomes a finding.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from shardstep.configs.cores import usable_cores
from shardstep.configs.errors import InputError
from shardstep.configs.imported import own_traceback
from shardstep.configs.load import LoadedRecipe, recipe_text
from shardstep.configs.recipe_code import Code, as_kept, code_of
from shardstep.configs.resolve import with_keys
from shardstep.configs.schema import Recipe, TrainConfig
from shardstep.configs.selection import mix_name
from shardstep.datasets.cache import cache_folder
from shardstep.datasets.decode_crop import PARTIAL, missing_for_partial
from shardstep.datasets.framing import framing_of
from shardstep.datasets.manifest import Manifest
from shardstep.datasets.resident import decoded_path
from shardstep.trainer import data, machine
from shardstep.trainer.distributed import launch_env, world
from shardstep.trainer.distributed.launchers import PLACE
from shardstep.trainer.distributed.meeting import waiting_aloud
from shardstep.trainer.distributed.store import LaunchStore
from shardstep.trainer.doctor import findings as checks
from shardstep.trainer.doctor import probe
from shardstep.trainer.doctor.findings import Finding, RankReport, Speed, merge, rank_list
from shardstep.trainer.kernels import winograd
from shardstep.trainer.resume import find_resume, with_earlier_choices
from shardstep.trainer.validate_recipe import validate_recipe

_BEFORE_A_WORLD = ("launch", "device", "gpu", "network", "world")  # errors of these checks prevent a world
_FASTER_STEP = (
    "give a longer --timeout; a smaller train.max_micro_batch or global batch takes less time, and so does a fixed "
    "train.precision, because auto measures several"
)
_GRACE_S = 5.0  # for ranks that give up a little later than others
_VISIBLE_S = 3.0  # within which a new file becomes visible on a network file system


@dataclass
class DoctorReport:
    """The result of a preflight."""

    prints: Literal["report", "findings", "nothing"]  # by this process; findings: the others cannot know of them
    facts: dict[str, Any]  # by topic
    ranks: list[RankReport]  # by rank, of those that came
    speeds: dict[int, Speed] = field(default_factory=dict)  # by rank, of those that were measured
    findings: list[Finding] = field(default_factory=list)  # errors first

    @property
    def errors(self) -> int:
        """The number of findings that would break a run."""
        return sum(finding.severity == "error" for finding in self.findings)


@contextlib.contextmanager
def run_preflight(
    loaded: LoadedRecipe | InputError, has_recipe: bool, timeout_s: float, measure_anew: bool = False
) -> Iterator[DoctorReport]:
    """Check this process and its machine, connect to the others, bring up a world, take one step. Leaving waits for all.

    Args:
        loaded: the recipe, or why it cannot be read.
        has_recipe: whether the user gave the recipe; if not, its data need not exist, and no step is taken.
        timeout_s: for the others to come, for the world to come up, and for the step.
        measure_anew: whether the step measures choices of `auto` even if an earlier start has kept the answer.
    """
    recipe, own, facts = _inspect(loaded, has_recipe)
    worker = futures.ThreadPoolExecutor(max_workers=1)  # its thread may hang; nobody waits for it
    try:
        environment: Mapping[str, str] = os.environ if own.world_size > 1 else {}
        meeting = worker.submit(LaunchStore, environment, timeout_s).result(timeout_s + _GRACE_S)
        with waiting_aloud("the others to come"):
            texts = meeting.share("records", own.to_json(), timeout_s)
    except InputError as error:
        unnamed = Finding.from_error("world", error, "set MASTER_ADDR to a name that this machine can resolve")
        yield DoctorReport("report" if own.rank == 0 else "findings", facts, [own], findings=[unnamed, *own.findings])
        return
    except (OSError, RuntimeError, futures.TimeoutError) as error:
        unmet = checks.unmet_finding(own, str(error), timeout_s, machine.is_loopback(own.launch["MASTER_ADDR"]))
        yield DoctorReport("report" if own.rank == 0 else "findings", facts, [own], findings=[unmet, *own.findings])
        return
    ranks = sorted(map(RankReport.from_json, texts), key=lambda report: report.rank)
    if own not in ranks:
        what = f"this process came after the others had stopped waiting, after {timeout_s:g} s"
        late = Finding("error", "world", what, "start all ranks at once, or give a longer --timeout")
        yield DoctorReport("findings", facts, [own], findings=[late, *own.findings])
        return

    is_copy = checks.is_one_of_many_worlds(own.launch) and own.launch.get("SLURM_PROCID", "0") != "0"
    prints: Literal["report", "nothing"] = "report" if ranks[0] == own and not is_copy else "nothing"
    report = DoctorReport(prints, facts, ranks, findings=checks.findings_of(ranks, timeout_s))
    if not any(finding.severity == "error" and finding.check in _BEFORE_A_WORLD for finding in report.findings):
        # Collectives wait longer than anything here, so that a rank that hangs is reported with its stack.
        train = dataclasses.replace(recipe.train if recipe else TrainConfig(), timeout_s=2 * timeout_s)
        all_ranks = _AllRanks(worker, meeting, report, own.rank, timeout_s)
        _try_world(all_ranks, train, recipe if has_recipe else None, measure_anew)
    if recipe:
        _check_disk(report, recipe)
    if has_recipe and "step" not in facts:
        facts.setdefault("no_step", "none was taken, because of the findings below")
    report.findings.sort(key=lambda finding: finding.severity)  # "error", then "warning"
    yield report
    with contextlib.suppress(RuntimeError):  # the process that holds the store has ended, and has everything
        meeting.leave(timeout_s)


# --- this process alone -----------------------------------------------------------------------------------------------


def _inspect(loaded: LoadedRecipe | InputError, has_recipe: bool) -> tuple[Recipe | None, RankReport, dict[str, Any]]:
    """Return the recipe, this process's report, and facts about its machine."""
    launch = launch_env.launch_variables(os.environ)
    findings = checks.place_findings(launch)
    place = {name.lower(): int(launch[name]) for name in PLACE if name in launch and not findings}
    is_misplaced, has_place = bool(findings), "rank" in place

    recipe: Recipe | None = None
    try:
        if isinstance(loaded, InputError):
            raise loaded
        recipe = validate_recipe(loaded)
        data.check_given_folders(loaded)
    except InputError as error:
        findings.append(Finding.from_error("recipe", error, "correct the recipe or the overrides"))
    except Exception as error:  # of code that the recipe names
        told = own_traceback(error)
        if told is None:
            raise
        what = f"{told.splitlines()[0]}: {told.splitlines()[-1]}"
        findings.append(Finding("error", "code", what, "correct it; `shardstep train` shows where"))
    train = recipe.train if recipe else TrainConfig()
    if not is_misplaced:
        findings += checks.launch_findings(launch, launch_env.launcher_variables())
        try:
            launch_env.check_launch(os.environ, train.world_size)
        except InputError as error:
            findings.append(Finding.from_error("launch", error, "start as many ranks as the recipe asks for"))
    device, found = _device(train.device, place.get("local_rank", 0))
    on_gpu = device.type == "cuda"
    findings += found + _machine_findings(train, launch, device)

    cores = usable_cores()
    threads = launch_env.explained_threads({} if is_misplaced else os.environ, train.threads)
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "versions": machine.versions(),
        "cpu": dataclasses.asdict(machine.read_cpu()),
        "cores": dataclasses.asdict(cores),
        "threads": dataclasses.asdict(threads),
        "memory_bytes": machine.memory_bytes(),
        "shm_bytes": machine.shared_memory_bytes(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backends": world.collective_backends(),
        "launcher": launch,
    }
    fingerprints, digest, code = None, None, Code()
    if recipe:
        digest = hashlib.sha256(recipe_text(as_kept(recipe)).encode()).hexdigest()
        code = code_of(recipe)
        facts["recipe"] = {"name": recipe.run.name, "sha256": digest}
        fingerprints, found = _check_data(recipe, has_recipe, device, facts)
        findings += found
        recipe, found = _check_run_dir(recipe, has_recipe, is_first=place.get("rank", 0) == 0)
        findings += found
    report = RankReport(
        host=facts["host"],
        pid=os.getpid(),
        **place,
        launch=launch,
        versions=facts["versions"],
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        gpu=str(torch.cuda.get_device_properties(device).uuid) if on_gpu else None,
        cores=cores.count,
        threads=threads.count,
        shm_bytes=facts["shm_bytes"],
        recipe_sha256=digest,
        code=code.files | code.packages,
        data=fingerprints,
        interface=machine.interface_towards(launch["MASTER_ADDR"]) if has_place else None,
        findings=findings,
    )
    return recipe, report, facts


def _device(wanted: str, local_rank: int) -> tuple[torch.device, list[Finding]]:
    """Return this rank's device; the CPU, with a finding, if the right one is not available."""
    try:
        kind = world.choose_device(wanted)
    except InputError as error:
        remedy = "ask Slurm for GPUs (--gpus-per-node), or use train.device=cpu"
        return torch.device("cpu"), [Finding.from_error("device", error, remedy)]
    if kind == "cpu":
        return torch.device("cpu"), []
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        what = f"LOCAL_RANK={local_rank}, but only {gpus} GPUs are visible here"
        if os.environ.get("CUDA_VISIBLE_DEVICES"):
            what += f" (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']})"
        remedy = "start at most one rank per GPU; let each rank see all GPUs of its host (no --gpus-per-task)"
        return torch.device("cpu"), [Finding("error", "gpu", what, remedy)]
    return torch.device("cuda", local_rank), []


def _machine_findings(train: TrainConfig, launch: Mapping[str, str], device: torch.device) -> list[Finding]:
    """Check network interfaces, the precision, and the compiler for CPU convolutions."""
    found = checks.socket_findings(launch, machine.interfaces(), uses_nccl=device.type == "cuda")
    found += checks.precision_findings(train.precision, device.type, machine.read_cpu())
    may_compile = device.type == "cpu" and train.convolutions in ("auto", "winograd") and train.compile == "none"
    if may_compile and (lacking := winograd.missing()):
        remedy = "install gcc, or set CC to a compiler; its output is kept in SHARDSTEP_CACHE"
        found.append(Finding("warning", "compiler", f"train.convolutions=winograd needs {lacking}", remedy))
    return found


def _check_data(
    recipe: Recipe, has_recipe: bool, device: torch.device, facts: dict[str, Any]
) -> tuple[str | None, list[Finding]]:
    """Open the recipe's data sets, if they exist; returns their fingerprints, and findings."""
    missing = list(data.missing_sets(recipe.data).values())
    if missing and (recipe.data.source or not has_recipe):
        facts["no_data"] = {"missing": missing, "source": recipe.data.source}
        return None, []
    try:
        parts = data.open_parts(recipe.data)
        mode = data.choose_mode(recipe.data, parts, device)
        recipe = with_keys(recipe, data={"crop_version": data.choose_crop_version(recipe.data, parts)})
    except (InputError, OSError) as error:
        remedy = "run `shardstep shards verify` on the folder, and write damaged shards again"
        return None, [Finding.from_error("data", error, remedy)]
    manifests = [shards.manifest for shards in data.opened_sets(parts)]
    shards = {"train": parts.train.manifest} | {name: part.manifest for name, part in parts.evaluated.items()}
    places = {"train": mix_name(recipe.data)} | data.folders_of(recipe.data)
    facts["data"] = {
        split: _data_facts(manifest, places[split]) for split, manifest in shards.items() if split in places
    }
    facts["data"]["mode"] = mode
    fingerprints = " and ".join(manifest.fingerprint[:12] for manifest in manifests)
    found = _decoder_findings(recipe, parts)
    if shared := data.shared_images(parts):
        found.append(Finding("warning", "data", shared, data.SHARED_IMAGES_REMEDY))
    return fingerprints, found + (_check_cache(recipe, manifests) if mode == "resident" else [])


def _decoder_findings(recipe: Recipe, parts: data.Parts) -> list[Finding]:
    """Check that this machine can decode only the needed parts of JPEGs, if the recipe has it do so or leaves it open."""
    remedy = "install gcc and the header of libjpeg-turbo (libjpeg62-turbo-dev in Debian)"
    if recipe.data.crop_version == PARTIAL and (lacks := missing_for_partial()):
        return [Finding("error", "compiler", f"data.crop_version={PARTIAL} needs {lacks}", f"{remedy}, or use 2")]
    note = data.whole_jpegs_note(recipe.data, parts)
    return [Finding("warning", "compiler", note, remedy)] if note else []


def _data_facts(manifest: Manifest, folder: str) -> dict[str, Any]:
    return {
        "folder": folder,
        "samples": manifest.samples,
        "classes": len(manifest.classes),
        "image_shape": manifest.image_shape,
        "bytes": manifest.bytes,
        "shards": len(manifest.shards),
        "fingerprint": manifest.fingerprint,
    }


def _check_cache(recipe: Recipe, manifests: list[Manifest]) -> list[Finding]:
    """Check that the images that are not decoded yet fit into the cache folder; the training set comes first."""
    folder, num_bytes, framing = cache_folder(), 0, framing_of(recipe.data)
    for manifest in manifests:
        shape = manifest.shape_when_read(framing, manifests[0].image_mode)
        if shape and not decoded_path(manifest, shape, framing).is_file():
            num_bytes += manifest.samples * math.prod(shape)
    if not num_bytes:
        return []
    remedy = "set SHARDSTEP_CACHE to a folder with enough space, or use data.mode=stream"
    problem = machine.write_problem(folder)
    if problem:
        return [Finding("error", "disk", f"the decoded images cannot be cached: {problem}", remedy)]
    return checks.disk_findings(machine.disk_space(folder), num_bytes, "the decoded images", remedy)


def _check_run_dir(recipe: Recipe, has_recipe: bool, is_first: bool) -> tuple[Recipe, list[Finding]]:
    """Check that the run's folder can be written, and that a run in it can be resumed; the recipe gets that run's choices."""
    problem = machine.write_problem(Path(recipe.run.dir))
    if problem:
        what = f"run.dir={recipe.run.dir} cannot be written: {problem}"
        return recipe, [Finding("error", "disk", what, "give another run.dir, or correct its owner and mode")]
    if has_recipe:
        try:
            recipe = with_earlier_choices(recipe)  # on every rank, as in training
            if is_first:
                find_resume(recipe)
        except (InputError, OSError) as error:
            return recipe, [Finding.from_error("run", error, "choose another run.dir")]
    return recipe, []


def _check_disk(report: DoctorReport, recipe: Recipe) -> None:
    """Check the space for the run's checkpoints: those kept, the best one, and one being written."""
    disk_space = machine.disk_space(Path(recipe.run.dir))
    checkpoints, size = recipe.checkpoint.keep + 2, report.facts.get("step", {}).get("checkpoint_bytes", 0)
    sizes = {"checkpoint_bytes": size, "checkpoints": checkpoints}
    report.facts["disk"] = dataclasses.asdict(disk_space) | sizes
    if not any(finding.check == "disk" for finding in report.findings):
        contents = f"{checkpoints} checkpoints of {size / 1e6:,.1f} MB" if size else "a run"
        remedy = "free space, or choose another run.dir"
        report.findings += checks.disk_findings(disk_space, checkpoints * size, contents, remedy)


# --- with the other processes -----------------------------------------------------------------------------------------


class _AllRanks:
    """Runs actions on all ranks at the same time; any rank may fail or hang."""

    def __init__(
        self, worker: futures.Executor, meeting: LaunchStore, report: DoctorReport, rank: int, timeout_s: float
    ):
        self.report, self.is_first, self.timeout_s = report, rank == 0, timeout_s
        self._worker, self._meeting, self._rank = worker, meeting, rank

    def run(self, check: str, action: Callable[[], Any], remedy: str) -> dict[int, Any] | None:
        """Run an action; returns each rank's result, or None, with findings in the report, unless it succeeded on all.

        The action returns what JSON can hold; one thread runs all actions. `remedy` is for errors without their own.
        """
        note = {"rank": self._rank} | self._attempt(check, action, remedy)
        try:
            texts = self._meeting.share(check, json.dumps(note), self.timeout_s + _GRACE_S)
            notes = [json.loads(text) for text in texts]
        except RuntimeError:  # the process that holds the store is gone, and perhaps the one that prints the report
            notes = [note]
            if self.report.prints == "nothing":
                self.report.prints = "findings"
        failed = [(entry["rank"], Finding(**entry["finding"])) for entry in notes if "finding" in entry]
        hung = [(entry["rank"], Finding(**entry["hung"])) for entry in notes if "hung" in entry]
        gone = {report.rank for report in self.report.ranks} - {entry["rank"] for entry in notes}
        found = failed if failed or gone else hung  # other ranks hang because they wait for these
        self.report.findings += merge(found, len(self.report.ranks))
        if gone:
            what = f"{rank_list(gone)} died, or hung"
            self.report.findings.append(Finding("error", check, what, f"check the output there; {remedy}"))
        return None if found or gone else {entry["rank"]: entry["value"] for entry in notes}

    def _attempt(self, check: str, action: Callable[[], Any], remedy: str) -> dict[str, Any]:
        """Run an action on this rank; returns its value, or a finding."""
        threads: list[int] = []

        def act() -> Any:
            threads.append(threading.get_ident())
            return action()

        future = self._worker.submit(act)
        futures.wait([future], self.timeout_s)
        if not future.done():
            what = f"not done after {self.timeout_s:g} s{_stack_text(threads)}"
            finding = Finding("error", check, what, f"{remedy}; or give a longer --timeout")
            if check == "step" and len(self.report.ranks) == 1:  # waits for no other rank: slow, but it does not hang
                finding = Finding("warning", "step", f"the first step, with its setup: {what}", _FASTER_STEP)
            return {"hung": dataclasses.asdict(finding)}
        if error := future.exception():  # of any kind: a run would fail with it
            return {"finding": dataclasses.asdict(Finding.from_error(check, error, remedy))}
        return {"value": future.result()}


def _stack_text(threads: list[int]) -> str:
    """Return the last two frames of a thread, as text."""
    frame = sys._current_frames().get(threads[0]) if threads else None
    if frame is None:
        return ""
    stack = traceback.extract_stack(frame)
    return f", now in {', '.join(f'{Path(at.filename).name}:{at.lineno} {at.name}' for at in stack[-2:])}"


def _check_shared_folder(all_ranks: _AllRanks, folder: Path) -> None:
    """Check that all hosts see the same folder: rank 0 puts a temporary file there."""
    place, remedy = machine.nearest(folder), "give a run.dir on a file system that all hosts share"
    with contextlib.ExitStack() as stack:

        def put() -> str:
            if not all_ranks.is_first:
                return ""
            try:
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".shardstep-doctor-", dir=place))
            except OSError:  # run.dir can be written, but not its parent: no check is possible
                return ""
            return Path(file.name).name

        def is_visible(name: str) -> bool:
            deadline = time.monotonic() + min(_VISIBLE_S, all_ranks.timeout_s / 2)
            while not (place / name).exists():
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
            return True

        names = all_ranks.run("mark", put, remedy)
        visible = all_ranks.run("sight", lambda: is_visible(names[0]), remedy) if names else None
    blind = [rank for rank, sees in (visible or {}).items() if not sees]
    if blind:
        what = f"{rank_list(blind)} cannot see what rank 0 writes in {place}: a run could not be resumed"
        all_ranks.report.findings.append(Finding("warning", "disk", what, remedy))


def _try_world(all_ranks: _AllRanks, train: TrainConfig, recipe: Recipe | None, measure_anew: bool) -> None:
    """Bring up the world as training does, measure it, and take a step of the recipe if there is one."""
    report, worlds = all_ranks.report, []

    def start() -> None:
        worlds.append(world.start_world(train))

    def step() -> dict[str, Any]:
        assert recipe is not None
        with tempfile.TemporaryDirectory(prefix="shardstep-doctor-", ignore_cleanup_errors=True) as folder:
            return dataclasses.asdict(probe.take_step(worlds[0], recipe, Path(folder), measure_anew))

    if all_ranks.run("world", start, checks.world_remedy(report.ranks)) is None:
        return
    remedy = "try again when no other program uses the device"
    speeds = all_ranks.run("speed", lambda: dataclasses.asdict(probe.measure_speed(worlds[0])), remedy)
    if speeds is None:
        return
    report.speeds = {rank: Speed(**speed) for rank, speed in speeds.items()}
    report.findings += checks.speed_findings(report.ranks, report.speeds)
    if recipe is None or report.errors:
        return
    if len({rank.host for rank in report.ranks}) > 1:
        _check_shared_folder(all_ranks, Path(recipe.run.dir).absolute().parent)
    source = report.facts.get("no_data", {}).get("source", "synthetic:")
    if not source.startswith("synthetic:"):
        report.facts["no_step"] = "none was taken: its data do not exist yet"
        return
    steps = all_ranks.run("step", step, "`shardstep train` with this recipe would fail in the same way, and show where")
    if steps:
        report.facts["step"] = steps[min(steps)] | {"seconds": max(taken["seconds"] for taken in steps.values())}
