"""One process of a launch through a preflight: a recipe in, what this process and all the others found out.

Every process comes here. They tell each other what they are, by notes that need no world; if nothing stands against it a
world comes up, is measured, and takes one step of the recipe. No wait is endless, and whatever fails becomes a finding.
"""

import contextlib
import dataclasses
import hashlib
import json
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

from shardstep.configs.errors import InputError
from shardstep.configs.load import LoadedRecipe, recipe_text
from shardstep.configs.schema import Recipe, TrainConfig
from shardstep.datasets.cache import cache_folder
from shardstep.datasets.manifest import MANIFEST_NAME, Manifest
from shardstep.trainer import data, machine
from shardstep.trainer.distributed import launch_env, world
from shardstep.trainer.distributed.store import LaunchStore
from shardstep.trainer.distributed.world import choose_device, collective_backends
from shardstep.trainer.doctor import probe
from shardstep.trainer.doctor.findings import (
    PLACE,
    Finding,
    RankReport,
    Speed,
    disk_findings,
    findings_of,
    is_one_of_many_worlds,
    launch_findings,
    merge,
    place_findings,
    precision_findings,
    problem_of,
    rank_list,
    socket_findings,
    speed_findings,
    unmet_finding,
    world_cure,
)
from shardstep.trainer.kernels import winograd
from shardstep.trainer.resume import find_resume, with_earlier_choices
from shardstep.trainer.validate import validate_recipe

_BEFORE_A_WORLD = ("launch", "device", "gpu", "network", "world")  # checks whose errors keep a world from coming up
_GRACE_S = 5.0  # for ranks that give up a little later than others
_SIGHT_S = 3.0  # in which a file on a network shows itself
_SHARDS_CURE = "run `shardstep shards verify` on the folder; write what is damaged again"


@dataclass
class DoctorReport:
    """What came out of a preflight.

    Attributes:
        voice: what this process tells the person: the whole report, its own findings (those that met it do not know of
            them), or nothing.
        facts: what is there, by topic.
        records: of the processes that came, by rank.
        speeds: of the ranks that were measured.
        findings: errors first.
    """

    voice: Literal["report", "findings", "nothing"]
    facts: dict[str, Any]
    records: list[RankReport]
    speeds: dict[int, Speed] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """How many findings would break a run."""
        return sum(finding.severity == "error" for finding in self.findings)


@contextlib.contextmanager
def check_up(loaded: LoadedRecipe | InputError, is_named: bool, timeout_s: float) -> Iterator[DoctorReport]:
    """Look at this process and its machine, meet the others, and try what can be tried; with the report, until all have it.

    Args:
        loaded: the recipe, or why it cannot be read.
        is_named: whether the recipe was asked for; if not, its data are looked at where they exist, and no step is taken.
        timeout_s: for the others to come, for the world to come up, for the step to be taken.
    """
    recipe, record, facts = _look(loaded, is_named)
    worker = futures.ThreadPoolExecutor(max_workers=1)  # what hangs in it is left there
    try:
        environment: Mapping[str, str] = os.environ if record.world_size > 1 else {}
        meeting = worker.submit(LaunchStore, environment, timeout_s).result(timeout_s + _GRACE_S)
        notes = meeting.share("records", record.to_json(), timeout_s)
    except (OSError, RuntimeError, futures.TimeoutError) as error:
        unmet = unmet_finding(record, str(error), timeout_s, machine.is_loopback(record.launch["MASTER_ADDR"]))
        yield DoctorReport(
            "report" if record.rank == 0 else "findings", facts, [record], findings=[unmet, *record.findings]
        )
        return
    records = sorted((RankReport.from_json(note) for note in notes), key=lambda other: other.rank)
    if record not in records:
        what = f"this process came when the others had ended their waiting of {timeout_s:g} s"
        late = Finding("error", "world", what, "start all ranks at once, or give a longer --timeout")
        yield DoctorReport("findings", facts, [record], findings=[late, *record.findings])
        return

    is_copy = is_one_of_many_worlds(record.launch) and record.launch.get("SLURM_PROCID", "0") != "0"
    speaks = records[0] == record and not is_copy
    report = DoctorReport("report" if speaks else "nothing", facts, records, findings=findings_of(records, timeout_s))
    if not any(finding.severity == "error" and finding.check in _BEFORE_A_WORLD for finding in report.findings):
        # longer than any wait here, so that a rank that hangs is told by where it stands
        train = dataclasses.replace(recipe.train if recipe else TrainConfig(), timeout_s=2 * timeout_s)
        _try_world(_Together(worker, meeting, report, record.rank, timeout_s), train, recipe if is_named else None)
    if recipe:
        _look_at_room(report, recipe)
    if is_named and "step" not in facts:
        facts.setdefault("no_step", "none was taken, for what is found below")
    report.findings.sort(key=lambda finding: finding.severity)  # "error", then "warning"
    yield report
    with contextlib.suppress(RuntimeError):  # who keeps the notes is gone, and has them all
        meeting.leave(timeout_s)


# --- alone ------------------------------------------------------------------------------------------------------------


def _look(loaded: LoadedRecipe | InputError, is_named: bool) -> tuple[Recipe | None, RankReport, dict[str, Any]]:
    """What this process can tell by itself; the facts are those of its machine."""
    launch = launch_env.launch_variables(os.environ)
    findings = place_findings(launch)
    place = {name.lower(): int(launch[name]) for name in PLACE if name in launch and not findings}
    is_told = "rank" in place

    recipe: Recipe | None = None
    try:
        if isinstance(loaded, InputError):
            raise loaded
        recipe = validate_recipe(loaded)
    except InputError as error:
        findings.append(Finding.from_error("recipe", error, "mend the recipe, or the overrides"))
    wanted = recipe.train if recipe else TrainConfig()
    if is_told or "RANK" not in launch:
        findings += launch_findings(launch, launch_env.launcher_variables())
        try:
            launch_env.check_launch(os.environ, wanted.world_size)
        except InputError as error:
            findings.append(Finding.from_error("launch", error, "start as many ranks as are asked for"))

    device, found = _device(wanted.device, place.get("local_rank", 0))
    findings += found
    cpu, names = machine.read_cpu(), machine.interfaces()
    findings += socket_findings(launch, names, uses_nccl=device.type == "cuda")
    findings += precision_findings(wanted.precision, device.type, cpu)
    may_compile = device.type == "cpu" and wanted.convolutions in ("auto", "winograd") and wanted.compile == "none"
    if may_compile and (lacking := winograd.missing()):
        cure = "install gcc, or name a compiler in CC; what it makes is kept in SHARDSTEP_CACHE"
        findings.append(Finding("warning", "compiler", f"train.convolutions=winograd needs {lacking}", cure))
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "versions": machine.versions(),
        "cpu": dataclasses.asdict(cpu),
        "memory_bytes": machine.memory_bytes(),
        "shm_bytes": machine.shared_memory_bytes(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backends": collective_backends(),
        "launcher": launch,
    }
    fingerprints, digest = None, None
    if recipe:
        digest = hashlib.sha256(recipe_text(recipe).encode()).hexdigest()
        facts["recipe"] = {"name": recipe.run.name, "sha256": digest}
        fingerprints, found = _look_at_data(recipe, is_named, device, facts)
        findings += found + _look_at_folder(recipe, is_named, is_first=place.get("rank", 0) == 0)
    record = RankReport(
        host=socket.gethostname(),
        pid=os.getpid(),
        **place,
        launch=launch,
        versions=facts["versions"],
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        gpu=str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None,
        cores=len(os.sched_getaffinity(0)),
        threads=launch_env.threads_per_rank(os.environ if is_told else {}),
        shm_bytes=facts["shm_bytes"],
        recipe_sha256=digest,
        data=fingerprints,
        interface=machine.interface_towards(launch["MASTER_ADDR"]) if is_told else None,
        findings=findings,
    )
    return recipe, record, facts


def _device(wanted: str, local_rank: int) -> tuple[torch.device, list[Finding]]:
    """This rank's device; the CPU where it cannot have the one it should."""
    try:
        kind = choose_device(wanted)
    except InputError as error:
        cure = "ask Slurm for GPUs (--gpus-per-node), or use train.device=cpu"
        return torch.device("cpu"), [Finding.from_error("device", error, cure)]
    if kind == "cpu":
        return torch.device("cpu"), []
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        what = f"LOCAL_RANK={local_rank}, but only {gpus} GPUs are visible here"
        if os.environ.get("CUDA_VISIBLE_DEVICES"):
            what += f" (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']})"
        cure = "start at most one rank per GPU; let each rank see all GPUs of its host (no --gpus-per-task)"
        return torch.device("cpu"), [Finding("error", "gpu", what, cure)]
    return torch.device("cuda", local_rank), []


def _look_at_data(
    recipe: Recipe, is_named: bool, device: torch.device, facts: dict[str, Any]
) -> tuple[str | None, list[Finding]]:
    """Open the recipe's data sets, where they are there; returns their fingerprints."""
    folders = {"train": Path(recipe.data.train), "test": Path(recipe.data.test)}
    missing = [f"{folder}" for folder in folders.values() if not (folder.expanduser() / MANIFEST_NAME).is_file()]
    if missing and (recipe.data.source or not is_named):
        facts["no_data"] = {"missing": missing, "source": recipe.data.source}
        return None, []
    try:
        train, test = data.open_both(recipe.data)
        mode = data.choose_mode(recipe.data, train, test, device)
    except (InputError, OSError) as error:
        return None, [problem_of(error, "data", _SHARDS_CURE)]
    facts["data"] = {
        "train": _figures(train.manifest, folders["train"]),
        "test": _figures(test.manifest, folders["test"]),
        "mode": mode,
    }
    both = f"{train.manifest.fingerprint[:12]} and {test.manifest.fingerprint[:12]}"
    return both, _look_at_cache(recipe, train.manifest, test.manifest) if mode == "resident" else []


def _figures(manifest: Manifest, folder: Path) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "samples": manifest.samples,
        "classes": len(manifest.classes),
        "image_shape": manifest.image_shape,
        "bytes": manifest.bytes,
        "shards": len(manifest.shards),
        "fingerprint": manifest.fingerprint,
    }


def _look_at_cache(recipe: Recipe, *manifests: Manifest) -> list[Finding]:
    """Whether the images that are not decoded yet fit into the cache folder."""
    folder, num_bytes = cache_folder(), 0
    for manifest in manifests:
        if not list(folder.glob(f"{manifest.fingerprint}-*.u8")):
            height, width = (recipe.data.resize,) * 2 if recipe.data.resize else (manifest.image_shape or [0, 0, 0])[1:]
            num_bytes += manifest.samples * manifest.channels * (height or 0) * (width or 0)
    if not num_bytes:
        return []
    cure = "point SHARDSTEP_CACHE at a folder that can take them, or use data.mode=stream"
    problem = machine.write_problem(folder)
    if problem:
        return [Finding("error", "disk", f"the decoded images cannot be kept: {problem}", cure)]
    return disk_findings(machine.disk_space(folder), num_bytes, "the decoded images", cure)


def _look_at_folder(recipe: Recipe, is_named: bool, is_first: bool) -> list[Finding]:
    """Whether the run's folder can be written, and whether what is in it can be gone on with."""
    problem = machine.write_problem(Path(recipe.run.dir))
    if problem:
        what = f"run.dir={recipe.run.dir} cannot be written: {problem}"
        return [Finding("error", "disk", what, "give a run.dir that can, or mend its owner and mode")]
    if is_named:
        try:
            recipe = with_earlier_choices(recipe)  # as training does, on every rank
            if is_first:
                find_resume(recipe)
        except (InputError, OSError) as error:
            return [problem_of(error, "run", "choose another run.dir")]
    return []


def _look_at_room(report: DoctorReport, recipe: Recipe) -> None:
    """Whether the run's file system has room for its checkpoints: those kept, the best one, and one being written."""
    disk_space = machine.disk_space(Path(recipe.run.dir))
    report.facts["disk"] = dataclasses.asdict(disk_space)
    checkpoints, size = recipe.checkpoint.keep + 2, report.facts.get("step", {}).get("checkpoint_bytes", 0)
    report.facts["disk"] |= {"checkpoint_bytes": size, "checkpoints": checkpoints}
    if any(finding.check == "disk" for finding in report.findings):  # it cannot be written at all
        return
    what_for = f"{checkpoints} checkpoints of {size / 1e6:,.1f} MB" if size else "a run"
    report.findings += disk_findings(disk_space, checkpoints * size, what_for, "make room, or choose another run.dir")


# --- with the others --------------------------------------------------------------------------------------------------


class _Together:
    """Actions that all ranks take at the same time, each of which may fail or hang on any of them."""

    def __init__(
        self, worker: futures.Executor, meeting: LaunchStore, report: DoctorReport, rank: int, timeout_s: float
    ):
        self.report, self.is_first = report, rank == 0
        self.timeout_s = timeout_s
        self._worker, self._meeting, self._rank = worker, meeting, rank

    def do(self, check: str, action: Callable[[], Any], cure: str) -> dict[int, Any] | None:
        """What an action returned on each rank; None, and findings in the report, if it did not succeed on all.

        Args:
            check: names the action.
            action: returns what JSON can hold. All actions are done by one thread.
            cure: where an error does not tell one.
        """
        note: dict[str, Any] = {"rank": self._rank}
        threads: list[int] = []

        def act() -> Any:
            threads.append(threading.get_ident())
            return action()

        doing = self._worker.submit(act)
        futures.wait([doing], self.timeout_s)
        if not doing.done():
            what = f"it did not end in {self.timeout_s:g} s{_where(threads)}"
            is_slow = check == "step" and len(self.report.records) == 1  # it waits for nobody
            finding = Finding("error", check, what, f"{cure}; or give a longer --timeout")
            note["hung"] = dataclasses.asdict(_slow_finding(what) if is_slow else finding)
        elif error := doing.exception():  # whatever it is, a run would have met it
            note["finding"] = dataclasses.asdict(problem_of(error, check, cure))
        else:
            note["value"] = doing.result()
        try:
            notes = [
                json.loads(text) for text in self._meeting.share(check, json.dumps(note), self.timeout_s + _GRACE_S)
            ]
        except RuntimeError:  # the process that keeps the notes is gone, and with it perhaps the one that speaks
            notes = [note]
            if self.report.voice == "nothing":
                self.report.voice = "findings"
        failed, hung = (
            [(entry["rank"], Finding(**entry[kind])) for entry in notes if kind in entry]
            for kind in ("finding", "hung")
        )
        gone = {record.rank for record in self.report.records} - {entry["rank"] for entry in notes}
        found = failed if failed or gone else hung  # who hangs then waits for those
        self.report.findings += merge(found, len(self.report.records))
        if gone:
            what = f"{rank_list(gone)} died, or hung"
            self.report.findings.append(Finding("error", check, what, f"look at the output there; {cure}"))
        return None if found or gone else {entry["rank"]: entry["value"] for entry in notes}


def _see_from_every_host(together: _Together, folder: Path) -> None:
    """Whether all hosts see the same folder: rank 0 puts a file there for a moment."""
    place, cure = machine.nearest(folder), "give a run.dir on a file system that all hosts share"
    with contextlib.ExitStack() as stack:

        def put() -> str:
            if not together.is_first:
                return ""
            try:
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".shardstep-doctor-", dir=place))
            except OSError:  # run.dir itself can be written, but not what is around it: then it cannot be told
                return ""
            return Path(file.name).name

        def see(name: str) -> bool:
            deadline = time.monotonic() + min(_SIGHT_S, together.timeout_s / 2)
            while not (place / name).exists():
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.1)
            return True

        names = together.do("mark", put, cure)
        seen = together.do("sight", lambda: see(names[0]), cure) if names else None
    blind = [rank for rank, sees in (seen or {}).items() if not sees]
    if blind:
        what = f"what rank 0 writes in {place} is not seen by {rank_list(blind)}: a run could not go on after a stop"
        together.report.findings.append(Finding("warning", "disk", what, cure))


def _slow_finding(what: str) -> Finding:
    cure = (
        "give a longer --timeout; a smaller train.max_micro_batch or global batch takes less time, and so does a given "
        "train.precision, because auto measures all there are"
    )
    return Finding("warning", "step", f"a step and what comes before it: {what}", cure)


def _where(threads: list[int]) -> str:
    """In which line the first of some threads stands."""
    frame = sys._current_frames().get(threads[0]) if threads else None
    if frame is None:
        return ""
    stack = traceback.extract_stack(frame)
    return f" and stands in {', '.join(f'{Path(at.filename).name}:{at.lineno} {at.name}' for at in stack[-2:])}"


def _try_world(together: _Together, train: TrainConfig, recipe: Recipe | None) -> None:
    """Bring the world up as training does, measure it, and take a step of the recipe if there is one."""
    report, worlds = together.report, []

    def start() -> None:
        worlds.append(world.start_world(train))

    def step() -> dict[str, Any]:
        assert recipe is not None
        with tempfile.TemporaryDirectory(prefix="shardstep-doctor-", ignore_cleanup_errors=True) as folder:
            return dataclasses.asdict(probe.take_step(worlds[0], recipe, Path(folder)))

    if together.do("world", start, world_cure(report.records)) is None:
        return
    cure = "try again when no other program uses the device"
    speeds = together.do("speed", lambda: dataclasses.asdict(probe.measure_speed(worlds[0])), cure)
    if speeds is None:
        return
    report.speeds = {rank: Speed(**speed) for rank, speed in speeds.items()}
    report.findings += speed_findings(report.records, report.speeds)
    if recipe is None or report.errors:
        return
    if len({record.host for record in report.records}) > 1:
        _see_from_every_host(together, Path(recipe.run.dir).absolute().parent)
    source = report.facts.get("no_data", {}).get("source", "synthetic:")
    if not source.startswith("synthetic:"):
        report.facts["no_step"] = "none was taken: its data are not there yet"
        return
    steps = together.do("step", step, "`shardstep train` with this recipe would end the same way, and say where")
    if steps:
        report.facts["step"] = steps[min(steps)] | {"seconds": max(taken["seconds"] for taken in steps.values())}
