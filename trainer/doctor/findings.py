"""What would break a run: records of all processes of a launch in, findings with their cures out. Looks at nothing itself."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shardstep.configs.errors import InputError
from shardstep.trainer.machine import Cpu, DiskSpace

LEAST_SHM_BYTES = 64 << 20  # containers often have no more, and NCCL's ranks on one machine talk through it
_LEAST_ROOM_BYTES, _LEAST_INODES = 100_000_000, 1000  # for lines, pictures and a small model's checkpoints
_SLOW_SHARE = 0.5  # of the ranks' median speed

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""The variables that tell a process its place."""

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something that would break a run (error), or make it worse than it could be (warning).

    Attributes:
        check: what was looked at, in a word.
        what: what is the matter, with its values.
        cure: what to do about it.
    """

    severity: Severity
    check: str
    what: str
    cure: str

    @classmethod
    def from_error(cls, check: str, error: Exception, cure: str) -> "Finding":
        """An error as the toolkit words them: what is the matter, then how to mend it. `cure`: where it does not say."""
        headline, *problems = str(error).splitlines()
        if problems:
            listed = "; ".join(problem.strip().removeprefix("- ") for problem in problems)
            return cls("error", check, f"{headline}: {listed}", cure)
        what, _, remedy = str(error).partition(". ")
        return cls("error", check, what, remedy[:1].lower() + remedy[1:] or cure)


@dataclass(frozen=True)
class RankReport:
    """What one process of a launch knows of itself, and has found by itself.

    Attributes:
        launch: the launchers' variables.
        device: "cpu", or the name of its GPU.
        gpu: that GPU's UUID; None without one.
        cores: that this process may use; `threads`: that it will.
        shm_bytes: size of /dev/shm.
        recipe_sha256: of the resolved recipe; None if it cannot be resolved.
        data: fingerprints of training and test set; None if they are not there.
        interface: through which it reaches MASTER_ADDR.
    """

    host: str
    pid: int = 0
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launch: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    gpu: str | None = None
    cores: int = 1
    threads: int = 1
    shm_bytes: int | None = None
    recipe_sha256: str | None = None
    data: str | None = None
    interface: str | None = None
    findings: Sequence[Finding] = ()

    def to_json(self) -> str:
        """A line that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        """What `to_json` wrote."""
        content = json.loads(text)
        return cls(**content | {"findings": [Finding(**entry) for entry in content["findings"]]})


@dataclass(frozen=True)
class Speed:
    """What one rank measured: matrix products in 1e9 operations a second, and what an all-reduce moves, in 1e6 bytes."""

    fp32_gflops: float
    bf16_gflops: float
    all_reduce_mb_s: float | None = None


# --- one process ------------------------------------------------------------------------------------------------------


def place_findings(launch: Mapping[str, str]) -> list[Finding]:
    """Whether a process that has a rank was told all the rest, in numbers."""
    if "RANK" not in launch:
        return []
    cure = "start it with torchrun or accelerate launch, or let the job script set all of them in each task"
    missing = [name for name in (*PLACE, "MASTER_ADDR", "MASTER_PORT") if name not in launch]
    if missing:
        return [Finding("error", "launch", f"RANK is set, but not {', '.join(missing)}", cure)]
    odd = [f"{name}={launch[name]}" for name in (*PLACE, "MASTER_PORT") if not launch[name].isdecimal()]
    if odd:
        return [Finding("error", "launch", f"{', '.join(odd)}: not a whole number", cure)]
    if int(launch["RANK"]) >= int(launch["WORLD_SIZE"]):
        what = f"RANK={launch['RANK']}, but WORLD_SIZE={launch['WORLD_SIZE']}: ranks count from 0"
        return [Finding("error", "launch", what, cure)]
    return []


def launch_findings(launch: Mapping[str, str], parent: Mapping[str, str]) -> list[Finding]:
    """Signs that this process was started in a way that brings up another world than was meant.

    Args:
        launch: the launchers' variables, which have passed `place_findings`.
        parent: those of the process that started it; they count if that is a launcher's agent.
    """
    if "RANK" not in launch:
        return []
    found = []
    world_size, tasks = int(launch["WORLD_SIZE"]), int(launch.get("SLURM_STEP_NUM_TASKS", "1"))
    under_agent = "TORCHELASTIC_RUN_ID" in launch
    if under_agent and "TORCHELASTIC_RUN_ID" in parent and "RANK" in parent:
        found.append(
            Finding(
                "error",
                "launch",
                f"the launcher of this process was itself started by a launcher, as rank {parent['RANK']} of "
                f"{parent.get('WORLD_SIZE', '?')}: each would bring up a world of its own",
                "use torchrun or accelerate launch once",
            )
        )
    agents = int(launch.get("GROUP_WORLD_SIZE", "1"))
    if under_agent and 1 <= agents < tasks and world_size >= tasks:  # of a smaller world, check_launch speaks
        found.append(
            Finding(
                "error",
                "launch",
                f"srun started {tasks} tasks, and each its own launcher, which knows of {agents}: {tasks} separate runs",
                "give torchrun --nnodes and --rdzv-endpoint, and start one task per node",
            )
        )
    machine, node = launch.get("GROUP_RANK"), launch.get("SLURM_NODEID")
    if "ACCELERATE_MIXED_PRECISION" in launch and tasks > 1 and machine != node and None not in (machine, node):
        found.append(
            Finding(
                "warning",
                "launch",
                f"machine rank {machine} on the node with SLURM_NODEID={node}",
                'accelerate launch --machine_rank "$SLURM_NODEID", read by the shell of the task',
            )
        )
    return found


def is_one_of_many_worlds(launch: Mapping[str, str]) -> bool:
    """Whether srun started several tasks that know nothing of each other, so that each would take itself for rank 0."""
    tasks = int(launch.get("SLURM_STEP_NUM_TASKS", launch.get("SLURM_NTASKS", "1") if "RANK" not in launch else "1"))
    agents = int(launch.get("GROUP_WORLD_SIZE", str(tasks)))
    return ("RANK" not in launch and tasks > 1) or int(launch.get("WORLD_SIZE", "1")) < tasks or agents < tasks


def socket_findings(launch: Mapping[str, str], interfaces: Collection[str], uses_nccl: bool) -> list[Finding]:
    """Whether the network interfaces that are asked for exist."""
    found = []
    several = launch.get("WORLD_SIZE", "1") != "1"
    for backend, used in (("GLOO", True), ("NCCL", uses_nccl)):
        variable = f"{backend}_SOCKET_IFNAME"
        wanted = launch.get(variable, "")
        if not wanted or not used or wanted.startswith("^"):  # ^ leaves out, and takes any other
            continue
        names = wanted.removeprefix("=").split(",")
        exact = backend == "GLOO" or wanted.startswith("=")
        absent = [
            name for name in names if not any(has == name if exact else has.startswith(name) for has in interfaces)
        ]
        if absent if backend == "GLOO" else len(absent) == len(names):  # NCCL takes those that it finds
            found.append(
                Finding(
                    "error" if several else "warning",
                    "network",
                    f"{variable}={wanted}, but there is no such interface here: {', '.join(sorted(interfaces))}",
                    f"set {variable} to one of these that leads to the other hosts, or unset it",
                )
            )
    return found


def precision_findings(precision: str, device: str, cpu: Cpu) -> list[Finding]:
    """Whether bf16 was asked for where it cannot pay."""
    if device == "cpu" and precision == "bf16" and not cpu.bf16_units:
        what = f"train.precision=bf16, but {cpu.name} has no bf16 units: it will be slower than fp32"
        return [Finding("warning", "precision", what, "train.precision=auto measures both and takes the faster")]
    return []


def disk_findings(free: DiskSpace, num_bytes: int, what_for: str, cure: str) -> list[Finding]:
    """Whether a file system has room, of both kinds, for what will be written to it."""
    found = []
    if free.bytes < max(num_bytes, _LEAST_ROOM_BYTES):
        what = (
            f"{free.folder}: {free.bytes / 1e6:,.0f} MB free, {max(num_bytes, _LEAST_ROOM_BYTES) / 1e6:,.0f} MB wanted"
        )
        found.append(Finding("error", "disk", f"{what} for {what_for}", cure))
    if free.inodes is not None and free.inodes < _LEAST_INODES:
        what = f"{free.folder}: only {free.inodes} more files can be made there (df -i), whatever room is left"
        found.append(Finding("error", "disk", what, f"delete small files, or {cure}"))
    return found


# --- all processes ----------------------------------------------------------------------------------------------------


def findings_of(records: Sequence[RankReport], timeout_s: float = 60) -> list[Finding]:
    """Everything that the records of a launch tell: what each found by itself, and what only shows beside the others.

    Args:
        records: of the processes that came, in any order.
        timeout_s: how long the others were waited for.
    """
    own = merge(((record.rank, finding) for record in records for finding in record.findings), len(records))
    checks = (_one_world, _ranks_once, _gpus_once, _hosts_by_group, _same_everywhere, _cores, _shared_memory)
    return own + _missing(records, timeout_s) + [finding for check in checks for finding in check(records)]


def merge(found: Iterable[tuple[int, Finding]], num_ranks: int) -> list[Finding]:
    """Each different finding of some ranks once; it names those that have it, if not all do."""
    ranks_of: dict[Finding, list[int]] = {}
    for rank, finding in found:
        ranks_of.setdefault(finding, []).append(rank)
    return [
        finding if len(ranks) == num_ranks else dataclasses.replace(finding, what=f"{rank_list(ranks)}: {finding.what}")
        for finding, ranks in ranks_of.items()
    ]


def speed_findings(records: Sequence[RankReport], speeds: Mapping[int, Speed]) -> list[Finding]:
    """Ranks that would hold up all others."""
    found = []
    host = {record.rank: record.host for record in records}
    kinds: tuple[tuple[str, str], ...] = (
        ("fp32_gflops", "GFLOP/s in fp32"),
        ("bf16_gflops", "GFLOP/s in bf16"),
        ("all_reduce_mb_s", "MB/s in all-reduces"),
    )
    for kind, unit in kinds:
        values = {rank: value for rank, speed in speeds.items() if (value := getattr(speed, kind)) is not None}
        median = statistics.median(values.values()) if values else 0
        for rank, value in sorted(values.items()):
            if value < _SLOW_SHARE * median:
                what = f"rank {rank} on {host[rank]} does {value:,.0f} {unit}, the ranks' median is {median:,.0f}"
                cure = (
                    "look for other work, a clock or power limit, or a bad link there; all ranks wait for the slowest"
                )
                found.append(Finding("warning", "speed", what, cure))
    return found


def rank_list(ranks: Iterable[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0-3, 7"."""
    ordered = sorted(set(ranks))
    spans: list[tuple[int, int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], rank)
        else:
            spans.append((rank, rank))
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' * (len(ordered) > 1)} {text}"


def _missing(records: Sequence[RankReport], timeout_s: float) -> list[Finding]:
    world_size = max(record.world_size for record in records)
    came = {record.rank for record in records}
    absent = set(range(world_size)) - came
    if not absent or len(records) >= world_size:  # all came, some under another's rank
        return []
    hosts = ", ".join(sorted({record.host for record in records}))
    what = f"{rank_list(absent)} of {world_size} did not come in {timeout_s:g} s; {rank_list(came)} did, on {hosts}"
    cure = (
        "look at the output of the hosts that are missing: did the command start there, with the same MASTER_ADDR and "
        "MASTER_PORT? Slow file systems need a longer --timeout"
    )
    return [Finding("error", "world", what, cure)]


def _one_world(records: Sequence[RankReport]) -> list[Finding]:
    if len({record.world_size for record in records}) < 2:
        return []
    what = f"WORLD_SIZE differs: {_values({record.rank: str(record.world_size) for record in records})}"
    return [Finding("error", "launch", what, "start all ranks by one command or one job script")]


def _ranks_once(records: Sequence[RankReport]) -> list[Finding]:
    found = []
    by_rank = _grouped(records, lambda record: record.rank)
    for rank, same in by_rank.items():
        if len(same) > 1:
            what = f"{len(same)} processes were told to be rank {rank}, on {', '.join(sorted({r.host for r in same}))}"
            cure = "start it once; each process needs a RANK of its own"
            if len({record.launch.get("SLURM_PROCID") for record in same}) > 1:  # of different tasks
                cure = (
                    "$SLURM_PROCID was read by the job script's shell; let that of the task read it, in single quotes: "
                    "srun bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec python ...'"
                )
            found.append(Finding("error", "launch", what, cure))
    once = [same[0] for same in by_rank.values()]
    for (host, local_rank), same in _grouped(once, lambda record: (record.host, record.local_rank)).items():
        if len(same) > 1 and len({record.launch.get("GROUP_RANK") for record in same}) == 1:  # two agents count anew
            what = f"{rank_list(r.rank for r in same)} on {host} all have LOCAL_RANK={local_rank}"
            found.append(Finding("error", "launch", what, "LOCAL_RANK counts the ranks of one host: $SLURM_LOCALID"))
    return found


def _gpus_once(records: Sequence[RankReport]) -> list[Finding]:
    on_gpus = [record for record in records if record.gpu is not None]
    return [
        Finding(
            "error",
            "gpu",
            f"{rank_list(record.rank for record in same)} on {host} share one GPU ({same[0].device}, {gpu})",
            "start one rank per GPU, and let every rank see all GPUs of its host: LOCAL_RANK chooses",
        )
        for (host, gpu), same in _grouped(on_gpus, lambda record: (record.host, record.gpu)).items()
        if len(same) > 1
    ]


def _hosts_by_group(records: Sequence[RankReport]) -> list[Finding]:
    with_agents = [record for record in records if "GROUP_RANK" in record.launch]
    found = []
    for group, same in _grouped(with_agents, lambda record: record.launch["GROUP_RANK"]).items():
        hosts = sorted({record.host for record in same})
        if len(hosts) > 1:
            what = f"{len(hosts)} hosts have machine rank {group}: {', '.join(hosts)}"
            cure = 'give each host its own: accelerate launch --machine_rank, torchrun --node-rank "$SLURM_NODEID"'
            found.append(Finding("error", "launch", what, cure))
    return found


def _same_everywhere(records: Sequence[RankReport]) -> list[Finding]:
    found = []
    for name in sorted({name for record in records for name in record.versions}):
        versions = {record.rank: record.versions.get(name, "missing") for record in records}
        if len(set(versions.values())) > 1:
            cure = "use the same environment on every host"
            found.append(Finding("error", "versions", f"{name} differs: {_values(versions)}", cure))
    recipes = {record.rank: record.recipe_sha256[:12] for record in records if record.recipe_sha256}
    if len(set(recipes.values())) > 1:
        cure = "give every rank the same recipe file and overrides"
        found.append(Finding("error", "recipe", f"the recipe differs: {_values(recipes)} (sha256)", cure))
    sets = {record.rank: record.data or "none" for record in records if record.recipe_sha256}
    if len(set(recipes.values())) > 1:  # which may name other data
        return found
    if len(set(sets.values())) > 1:
        cure = "copy one set of shards to every host, or put it on a file system that all see"
        found.append(Finding("error", "data", f"the data sets differ: {_values(sets)} (fingerprints)", cure))
    return found


def _cores(records: Sequence[RankReport]) -> list[Finding]:
    found = []
    for host, same in _grouped(records, lambda record: record.host).items():
        ranks, cores = len(same), max(record.cores for record in same)
        if ranks > cores and all(record.gpu is None for record in same):
            what = f"{ranks} ranks on {host}, where they may use {cores} core{'s' * (cores > 1)}"
            cure = "start at most one rank per core, or ask Slurm for more: --cpus-per-task, also for srun"
            found.append(Finding("warning", "cores", what, cure))
    return found


def _shared_memory(records: Sequence[RankReport]) -> list[Finding]:
    found = []
    for host, same in _grouped(records, lambda record: record.host).items():
        sizes = [record.shm_bytes for record in same if record.shm_bytes is not None]
        if len(same) > 1 and sizes and min(sizes) < LEAST_SHM_BYTES:
            what = f"/dev/shm on {host} has {min(sizes) / 2**20:.0f} MiB for {len(same)} ranks, which talk through it"
            cure = "give the container more: --shm-size=1g, or --ipc=host"
            found.append(Finding("warning", "memory", what, cure))
    return found


def _grouped(records: Iterable[RankReport], key: Callable[[RankReport], Any]) -> dict[Any, list[RankReport]]:
    groups: dict[Any, list[RankReport]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _values(by_rank: Mapping[int, str]) -> str:
    """Different values and who has them: "2.15 on ranks 0-2, 2.14 on rank 3"."""
    ranks_of: dict[str, list[int]] = {}
    for rank, value in sorted(by_rank.items()):
        ranks_of.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {rank_list(ranks)}" for value, ranks in ranks_of.items())


def unmet_finding(record: RankReport, error: str, timeout_s: float, is_loopback: bool) -> Finding:
    """The finding of a process that could not meet the others at MASTER_ADDR and MASTER_PORT.

    Args:
        record: of the process.
        error: what its attempt said.
        timeout_s: how long it tried.
        is_loopback: whether MASTER_ADDR means whichever machine uses it.
    """
    address = f"MASTER_ADDR={record.launch['MASTER_ADDR']}, MASTER_PORT={record.launch['MASTER_PORT']}"
    said = error.splitlines()[0] if error else "what listens there does not answer"
    what = f"rank {record.rank} on {record.host} could not meet the others at {address} in {timeout_s:g} s: {said}"
    cure = "start rank 0 on that host, let the firewall pass the port; if another program has it, choose another port"
    if is_loopback and record.world_size > record.local_world_size:
        cure = "give MASTER_ADDR the name of the first host: here it means this very machine on every host"
    return Finding("error", "world", what, cure)


def world_cure(records: Sequence[RankReport]) -> str:
    """What to do when ranks have met, but a world of them does not come up."""
    ways = sorted({f"{record.interface} on {record.host}" for record in records if record.interface})
    if len({record.host for record in records}) == 1:
        chosen = any(name.endswith("_SOCKET_IFNAME") for record in records for name in record.launch)
        return (
            "unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or name an interface that has an address"
            if chosen
            else "NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL shows more"
        )
    return (
        f"set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME, on GPUs) to the interface that leads to the other hosts, and let "
        f"the firewall pass all ports between them; MASTER_ADDR is reached by {', '.join(ways) or 'no known interface'}"
    )


def problem_of(error: BaseException, check: str, cure: str) -> Finding:
    """A finding from whatever went wrong: told in full where the toolkit words it, in a line where a library does."""
    if isinstance(error, InputError):
        return Finding.from_error(check, error, cure)
    first = (str(error).strip() or "no message").splitlines()[0]
    return Finding("error", check, f"{type(error).__name__}: {first}", cure)
