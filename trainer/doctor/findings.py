"""What would break a run: the reports of all ranks in, findings with their remedies out. Pure functions."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from shardstep.configs.errors import InputError
from shardstep.configs.text import count
from shardstep.trainer.distributed.launch_env import place_problem
from shardstep.trainer.machine import Cpu, DiskSpace

LEAST_SHM_BYTES = 64 << 20  # the default of many containers; NCCL's ranks on one machine communicate through it
_LEAST_DISK_BYTES, _LEAST_INODES = 100_000_000, 1000  # for metrics, pictures and a small model's checkpoints
_COUNTS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "GROUP_WORLD_SIZE", "WORLD_SIZE")
_SLOW_SHARE = 0.5  # of the ranks' median speed

Severity = Literal["error", "warning"]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Finding:
    """Something that would break a run (error) or make it worse than necessary (warning)."""

    severity: Severity
    check: str  # what was checked, in one word
    what: str  # the problem, with its values
    remedy: str

    @classmethod
    def from_error(cls, check: str, error: BaseException, remedy: str) -> "Finding":
        """Turn an error into a finding. An InputError keeps its own remedy, if it has one; `remedy` is for all others."""
        if not isinstance(error, InputError):
            first_line = (str(error).strip() or "no message").splitlines()[0]
            return cls("error", check, f"{type(error).__name__}: {first_line}", remedy)
        headline, *problems = str(error).splitlines()
        if problems:
            listed = "; ".join(problem.strip().removeprefix("- ") for problem in problems)
            return cls("error", check, f"{headline}: {listed}", remedy)
        what, _, own_remedy = str(error).partition(". ")
        return cls("error", check, what, own_remedy[:1].lower() + own_remedy[1:] or remedy)


@dataclass(frozen=True)
class RankReport:
    """What one process of a launch reports about itself, and its own findings."""

    host: str
    pid: int = 0
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launch: Mapping[str, str] = field(default_factory=dict)  # the launchers' variables
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"  # "cpu", or the name of its GPU
    gpu: str | None = None  # that GPU's UUID; None without one
    cores: int = 1  # that this process may use
    threads: int = 1  # that it will use
    shm_bytes: int | None = None  # size of /dev/shm
    recipe_sha256: str | None = None  # of the resolved recipe; None if it is invalid
    code: Mapping[str, str] = field(default_factory=dict)  # of the recipe: sha256 of files, versions of packages
    data: str | None = None  # fingerprints of training and test set; None if they do not exist
    interface: str | None = None  # the network interface towards MASTER_ADDR
    findings: Sequence[Finding] = ()

    def to_json(self) -> str:
        """Return a line that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        """Read what `to_json` returned."""
        content = json.loads(text)
        return cls(**content | {"findings": [Finding(**entry) for entry in content["findings"]]})


@dataclass(frozen=True)
class Speed:
    """The speed of one rank: matrix products in GFLOP/s, and all-reduce in MB/s."""

    fp32_gflops: float
    bf16_gflops: float
    all_reduce_mb_s: float | None = None


# --- one process ------------------------------------------------------------------------------------------------------


def place_findings(launch: Mapping[str, str]) -> list[Finding]:
    """Check that the variables of this process's place in its world are complete, and valid numbers."""
    problem = place_problem(launch)
    return [Finding("error", "launch", *problem)] if problem else []


def launch_findings(launch: Mapping[str, str], parent: Mapping[str, str]) -> list[Finding]:
    """Look for signs that this launch brings up another world than intended.

    `launch`: the launchers' variables, which have passed `place_findings`; `parent`: those of the parent process.
    """
    if "RANK" not in launch:
        return []
    found = []
    world_size, tasks = int(launch["WORLD_SIZE"]), int(launch.get("SLURM_STEP_NUM_TASKS", "1"))
    under_agent = "TORCHELASTIC_RUN_ID" in launch
    if under_agent and "TORCHELASTIC_RUN_ID" in parent and "RANK" in parent:
        what = (
            f"the launcher of this process was itself started by a launcher, as rank {parent['RANK']} of "
            f"{parent.get('WORLD_SIZE', '?')}: each would bring up its own world"
        )
        found.append(Finding("error", "launch", what, "use torchrun or accelerate launch once"))
    agents = int(launch.get("GROUP_WORLD_SIZE", "1"))
    if under_agent and 1 <= agents < tasks and world_size >= tasks:  # check_launch reports a smaller world
        what = f"srun started {tasks} tasks, and each its own launcher, which knows of {agents}: {tasks} separate runs"
        remedy = "give torchrun --nnodes and --rdzv-endpoint, and start one task per node"
        found.append(Finding("error", "launch", what, remedy))
    machine, node = launch.get("GROUP_RANK"), launch.get("SLURM_NODEID")
    if "ACCELERATE_MIXED_PRECISION" in launch and tasks > 1 and machine != node and None not in (machine, node):
        what = f"machine rank {machine} on the node with SLURM_NODEID={node}"
        remedy = 'accelerate launch --machine_rank "$SLURM_NODEID", expanded by the shell of the task'
        found.append(Finding("warning", "launch", what, remedy))
    return found


def is_one_of_many_worlds(launch: Mapping[str, str]) -> bool:
    """Return whether srun started several tasks that are unaware of each other, so that each would be rank 0."""
    if any(not number.isdecimal() for name, number in launch.items() if name in _COUNTS):
        return False
    tasks = int(launch.get("SLURM_STEP_NUM_TASKS", launch.get("SLURM_NTASKS", "1") if "RANK" not in launch else "1"))
    agents = int(launch.get("GROUP_WORLD_SIZE", str(tasks)))
    return ("RANK" not in launch and tasks > 1) or int(launch.get("WORLD_SIZE", "1")) < tasks or agents < tasks


def socket_findings(launch: Mapping[str, str], interfaces: Collection[str], uses_nccl: bool) -> list[Finding]:
    """Check that the network interfaces set for gloo and NCCL exist."""
    found = []
    severity: Severity = "error" if launch.get("WORLD_SIZE", "1") != "1" else "warning"
    for backend, used in (("GLOO", True), ("NCCL", uses_nccl)):
        variable = f"{backend}_SOCKET_IFNAME"
        wanted = launch.get(variable, "")
        if not wanted or not used or wanted.startswith("^"):  # ^ excludes interfaces, and accepts any other
            continue
        names = wanted.removeprefix("=").split(",")
        exact = backend == "GLOO" or wanted.startswith("=")
        present = interfaces if exact else {name for name in names for has in interfaces if has.startswith(name)}
        absent = [name for name in names if name not in present]
        if absent if backend == "GLOO" else len(absent) == len(names):  # NCCL uses those that exist
            what = f"{variable}={wanted}, but there is no such interface here: {', '.join(sorted(interfaces))}"
            remedy = f"set {variable} to one of these that leads to the other hosts, or unset it"
            found.append(Finding(severity, "network", what, remedy))
    return found


def precision_findings(precision: str, device: str, cpu: Cpu) -> list[Finding]:
    """Warn about bf16 on a processor without bf16 units."""
    if device == "cpu" and precision == "bf16" and not cpu.bf16_units:
        what = f"train.precision=bf16, but {cpu.name} has no bf16 units: it will be slower than fp32"
        return [Finding("warning", "precision", what, "train.precision=auto measures both and uses the faster")]
    return []


def disk_findings(free: DiskSpace, num_bytes: int, contents: str, remedy: str) -> list[Finding]:
    """Check that a file system has enough bytes and inodes for what a run will write to it."""
    found, least = [], max(num_bytes, _LEAST_DISK_BYTES)
    if free.bytes < least:
        what = f"{free.folder}: {free.bytes / 1e6:,.0f} MB free, {least / 1e6:,.0f} MB needed for {contents}"
        found.append(Finding("error", "disk", what, remedy))
    if free.inodes is not None and free.inodes < _LEAST_INODES:
        what = f"{free.folder}: only {free.inodes} more files can be created there (df -i), however much space is left"
        found.append(Finding("error", "disk", what, f"delete small files, or {remedy}"))
    return found


# --- all processes ----------------------------------------------------------------------------------------------------


def findings_of(reports: Sequence[RankReport], timeout_s: float = 60) -> list[Finding]:
    """Return the findings of the ranks that came, and of their comparison; they waited `timeout_s` for the others."""
    own = merge(((report.rank, finding) for report in reports for finding in report.findings), len(reports))
    checks = (_one_world, _ranks_once, _gpus_once, _hosts_by_group, _same_everywhere, _cores, _shared_memory)
    return own + _missing(reports, timeout_s) + [finding for check in checks for finding in check(reports)]


def merge(found: Iterable[tuple[int, Finding]], num_ranks: int) -> list[Finding]:
    """Return each distinct finding once, with the ranks that have it unless all do."""
    ranks_of: dict[Finding, list[int]] = {}
    for rank, finding in found:
        ranks_of.setdefault(finding, []).append(rank)
    return [
        finding if len(ranks) == num_ranks else dataclasses.replace(finding, what=f"{rank_list(ranks)}: {finding.what}")
        for finding, ranks in ranks_of.items()
    ]


def speed_findings(reports: Sequence[RankReport], speeds: Mapping[int, Speed]) -> list[Finding]:
    """Warn about ranks that would slow down all others."""
    found = []
    host = {report.rank: report.host for report in reports}
    remedy = "look for other work, a clock or power limit, or a bad link there; all ranks wait for the slowest"
    for kind, unit in (
        ("fp32_gflops", "GFLOP/s in fp32"),
        ("bf16_gflops", "GFLOP/s in bf16"),
        ("all_reduce_mb_s", "MB/s in all-reduces"),
    ):
        values = {rank: value for rank, speed in speeds.items() if (value := getattr(speed, kind)) is not None}
        median = statistics.median(values.values()) if values else 0
        for rank, value in sorted(values.items()):
            if value < _SLOW_SHARE * median:
                what = f"rank {rank} on {host[rank]} does {value:,.0f} {unit}, the ranks' median is {median:,.0f}"
                found.append(Finding("warning", "speed", what, remedy))
    return found


def rank_list(ranks: Iterable[int]) -> str:
    """Return ranks as text: "rank 3", "ranks 0-3, 7"."""
    spans: list[tuple[int, int]] = []
    for rank in sorted(set(ranks)):
        if spans and rank == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], rank)
        else:
            spans.append((rank, rank))
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{'rank' if text.isdecimal() else 'ranks'} {text}"


def _missing(reports: Sequence[RankReport], timeout_s: float) -> list[Finding]:
    world_size = max(report.world_size for report in reports)
    came = {report.rank for report in reports}
    absent = set(range(world_size)) - came
    if not absent or len(reports) >= world_size:  # all came, some with another's rank
        return []
    hosts = ", ".join(sorted({report.host for report in reports}))
    what = f"{rank_list(absent)} of {world_size} did not come in {timeout_s:g} s; {rank_list(came)} did, on {hosts}"
    remedy = (
        "check the output of the missing hosts: did the command start there, with the same MASTER_ADDR and "
        "MASTER_PORT? Slow file systems need a longer --timeout"
    )
    return [Finding("error", "world", what, remedy)]


def _one_world(reports: Sequence[RankReport]) -> list[Finding]:
    if len({report.world_size for report in reports}) < 2:
        return []
    what = f"WORLD_SIZE differs: {_values({report.rank: str(report.world_size) for report in reports})}"
    return [Finding("error", "launch", what, "start all ranks by one command or one job script")]


def _ranks_once(reports: Sequence[RankReport]) -> list[Finding]:
    found = []
    by_rank = _grouped(reports, lambda report: report.rank)
    for rank, same in by_rank.items():
        if len(same) > 1:
            what = f"{len(same)} processes have rank {rank}, on {', '.join(sorted({r.host for r in same}))}"
            remedy = "start it once; each process needs a different RANK"
            if len({report.launch.get("SLURM_PROCID") for report in same}) > 1:  # of different tasks
                remedy = (
                    "the job script's shell expanded $SLURM_PROCID; let the task's shell do it, with single quotes: "
                    "srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec python ...'"
                )
            found.append(Finding("error", "launch", what, remedy))
    once = [same[0] for same in by_rank.values()]
    for (host, local_rank), same in _grouped(once, lambda report: (report.host, report.local_rank)).items():
        agents = {report.launch.get("GROUP_RANK") for report in same}  # each counts from 0
        if len(same) > 1 and len(agents) == 1:
            what = f"{_ranks_of(same)} on {host} all have LOCAL_RANK={local_rank}"
            found.append(Finding("error", "launch", what, "LOCAL_RANK counts the ranks of one host: $SLURM_LOCALID"))
    return found


def _gpus_once(reports: Sequence[RankReport]) -> list[Finding]:
    on_gpus = [report for report in reports if report.gpu is not None]
    remedy = "start one rank per GPU, and let every rank see all GPUs of its host: LOCAL_RANK chooses"
    return [
        Finding("error", "gpu", f"{_ranks_of(same)} on {host} share one GPU ({same[0].device}, {gpu})", remedy)
        for (host, gpu), same in _grouped(on_gpus, lambda report: (report.host, report.gpu)).items()
        if len(same) > 1
    ]


def _hosts_by_group(reports: Sequence[RankReport]) -> list[Finding]:
    with_agents = [report for report in reports if "GROUP_RANK" in report.launch]
    remedy = 'give each host its own: accelerate launch --machine_rank, torchrun --node-rank "$SLURM_NODEID"'
    return [
        Finding("error", "launch", f"{len(hosts)} hosts have machine rank {group}: {', '.join(hosts)}", remedy)
        for group, same in _grouped(with_agents, lambda report: report.launch["GROUP_RANK"]).items()
        if len(hosts := sorted({report.host for report in same})) > 1
    ]


def _same_everywhere(reports: Sequence[RankReport]) -> list[Finding]:
    found = []
    for name in sorted({name for report in reports for name in report.versions}):
        versions = {report.rank: report.versions.get(name, "missing") for report in reports}
        if len(set(versions.values())) > 1:
            remedy = "use the same environment on every host"
            found.append(Finding("error", "versions", f"{name} differs: {_values(versions)}", remedy))
    recipes = {report.rank: report.recipe_sha256[:12] for report in reports if report.recipe_sha256}
    sets = {report.rank: report.data or "none" for report in reports if report.recipe_sha256}
    if len(set(recipes.values())) > 1:  # then the data may differ, too
        remedy = "give every rank the same recipe file and overrides"
        found.append(Finding("error", "recipe", f"the recipe differs: {_values(recipes)} (sha256)", remedy))
    for name in sorted({name for report in reports for name in report.code}):
        own = {report.rank: report.code.get(name, "missing")[:12] for report in reports if report.code}
        if len(set(own.values())) > 1:
            remedy = "copy one state of the code to every host, or put it on a shared file system"
            found.append(Finding("error", "code", f"{name} differs: {_values(own)}", remedy))
    if len(set(recipes.values())) == 1 and len(set(sets.values())) > 1:
        remedy = "copy one set of shards to every host, or put it on a shared file system"
        found.append(Finding("error", "data", f"the data sets differ: {_values(sets)} (fingerprints)", remedy))
    return found


def _cores(reports: Sequence[RankReport]) -> list[Finding]:
    found = []
    remedy = (
        "start at most one rank per core, or ask for more: Slurm's --cpus-per-task, also for srun; a container's --cpus"
    )
    for host, same in _grouped(reports, lambda report: report.host).items():
        cores = max(report.cores for report in same)
        if len(same) > cores and all(report.gpu is None for report in same):
            what = f"{len(same)} ranks on {host}, where they may use {count(cores, 'core')}"
            found.append(Finding("warning", "cores", what, remedy))
    return found


def _shared_memory(reports: Sequence[RankReport]) -> list[Finding]:
    found = []
    for host, same in _grouped(reports, lambda report: report.host).items():
        sizes = [report.shm_bytes for report in same if report.shm_bytes is not None]
        if len(same) > 1 and sizes and min(sizes) < LEAST_SHM_BYTES:
            size = f"{min(sizes) / 2**20:.0f} MiB"
            what = f"/dev/shm on {host} has {size} for {len(same)} ranks, which communicate through it"
            remedy = "give the container more: --shm-size=1g, or --ipc=host"
            found.append(Finding("warning", "memory", what, remedy))
    return found


def _grouped(items: Iterable[_Item], key: Callable[[_Item], Any]) -> dict[Any, list[_Item]]:
    groups: dict[Any, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _ranks_of(reports: Iterable[RankReport]) -> str:
    return rank_list(report.rank for report in reports)


def _values(by_rank: Mapping[int, str]) -> str:
    """Return the different values and the ranks that have them: "2.15 on ranks 0-2, 2.14 on rank 3"."""
    ranks_of = _grouped(sorted(by_rank), by_rank.__getitem__)
    return ", ".join(f"{value} on {rank_list(ranks)}" for value, ranks in ranks_of.items())


def unmet_finding(report: RankReport, error: str, timeout_s: float, is_loopback: bool) -> Finding:
    """Return the finding of a process that could not reach the others in `timeout_s`; is MASTER_ADDR a loopback address?"""
    address = f"MASTER_ADDR={report.launch['MASTER_ADDR']}, MASTER_PORT={report.launch['MASTER_PORT']}"
    message = error.splitlines()[0] if error else "the process that listens there does not answer"
    what = f"rank {report.rank} on {report.host} could not reach the others at {address} in {timeout_s:g} s: {message}"
    remedy = "start rank 0 on that host, let the firewall pass the port; if another program has it, choose another port"
    if is_loopback and report.world_size > report.local_world_size:
        remedy = "set MASTER_ADDR to the name of the first host: this address means each host itself"
    return Finding("error", "world", what, remedy)


def world_remedy(reports: Sequence[RankReport]) -> str:
    """Return what to do when the processes have met, but a world of them does not come up."""
    ways = sorted({f"{report.interface} on {report.host}" for report in reports if report.interface})
    if len({report.host for report in reports}) > 1:
        return (
            f"set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME, on GPUs) to the interface that leads to the other hosts, and "
            f"let the firewall pass all ports between them; MASTER_ADDR is reached by {', '.join(ways) or 'no interface'}"
        )
    if any(name.endswith("_SOCKET_IFNAME") for report in reports for name in report.launch):
        return "unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or set them to an interface that has an address"
    return "NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL shows more"
