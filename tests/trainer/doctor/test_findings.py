"""Findings from made-up reports: one for each planted fault, and none for a healthy launch."""

from dataclasses import replace
from typing import Any

import pytest

from shardstep.configs.errors import InputError
from shardstep.trainer.doctor.findings import (
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
    rank_list,
    socket_findings,
    speed_findings,
    unmet_finding,
    world_remedy,
)
from shardstep.trainer.machine import Cpu, DiskSpace, interface_towards, interfaces, parse_cpu, write_problem

VERSIONS = {"python": "3.11.7", "torch": "2.15.0"}
PLACED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "one",
    "MASTER_PORT": "29500",
}


def launch_of_four(**changes: dict[int, Any]) -> list[RankReport]:
    """Two hosts with two ranks each, under agents; `changes`: values of a field by rank."""
    records = []
    for rank in range(4):
        record = RankReport(
            host=("one", "two")[rank // 2],
            rank=rank,
            local_rank=rank % 2,
            world_size=4,
            local_world_size=2,
            launch={"GROUP_RANK": str(rank // 2)},
            versions=VERSIONS,
            device="H100",
            gpu=f"GPU-{rank}",
            cores=8,
            threads=4,
            shm_bytes=1 << 30,
            recipe_sha256="a" * 64,
            data="f1 and f2",
            interface="eth0",
        )
        own = {name: values[rank] for name, values in changes.items() if rank in values}
        records.append(replace(record, **own))
    return records


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    assert findings[0].remedy
    return findings[0]


def test_a_healthy_launch_has_no_findings() -> None:
    assert findings_of(launch_of_four()) == []
    assert findings_of([RankReport(host="one")]) == []


def test_records_travel_as_text() -> None:
    record = replace(launch_of_four()[3], findings=[Finding("error", "gpu", "what", "remedy")])
    assert RankReport.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    ("changes", "check", "what"),
    [
        ({"gpu": {1: "GPU-0"}}, "gpu", "ranks 0-1 on one share one GPU (H100, GPU-0)"),
        ({"versions": {3: VERSIONS | {"torch": "2.14.0"}}}, "versions",
         "torch differs: 2.15.0 on ranks 0-2, 2.14.0 on rank 3"),
        ({"versions": {0: {"python": "3.11.7"}}}, "versions", "torch differs: missing on rank 0, 2.15.0 on ranks 1-3"),
        ({"recipe_sha256": {2: "b" * 64}}, "recipe",
         "the recipe differs: aaaaaaaaaaaa on ranks 0-1, 3, bbbbbbbbbbbb on rank 2 (sha256)"),
        ({"data": {2: None, 3: None}}, "data", "the data sets differ: f1 and f2 on ranks 0-1, none on ranks 2-3"),
        ({"rank": {1: 0}}, "launch", "2 processes have rank 0, on one"),
        ({"local_rank": {1: 0}}, "launch", "ranks 0-1 on one all have LOCAL_RANK=0"),
        ({"world_size": {3: 2}}, "launch", "WORLD_SIZE differs: 4 on ranks 0-2, 2 on rank 3"),
        ({"launch": {2: {"GROUP_RANK": "0"}, 3: {"GROUP_RANK": "0"}}}, "launch",
         "2 hosts have machine rank 0: one, two"),
        ({"shm_bytes": {2: 1 << 20, 3: 1 << 20}}, "memory", "/dev/shm on two has 1 MiB for 2 ranks"),
        ({"findings": {3: [Finding("error", "disk", "full", "delete")]}}, "disk", "rank 3: full"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(changes: dict[str, dict[int, Any]], check: str, what: str) -> None:
    finding = only(findings_of(launch_of_four(**changes)))
    assert finding.check == check
    assert finding.what.startswith(what)


def test_tasks_whose_rank_was_read_too_early_get_the_remedy_for_that() -> None:
    records = [replace(record, rank=0, launch={"SLURM_PROCID": str(record.rank)}) for record in launch_of_four()]
    finding = only(findings_of(records))
    assert finding.what == "4 processes have rank 0, on one, two"
    assert "the job script's shell expanded $SLURM_PROCID" in finding.remedy


def test_ranks_that_did_not_come_are_listed() -> None:
    finding = only(findings_of(launch_of_four()[:2], timeout_s=7))
    assert finding.severity == "error"
    assert finding.what == "ranks 2-3 of 4 did not come in 7 s; ranks 0-1 did, on one"


def test_several_agents_on_one_host_each_count_local_ranks() -> None:
    records = [replace(record, host="one") for record in launch_of_four()]
    assert findings_of(records) == []


def test_more_ranks_than_cores_is_a_warning_on_cpus() -> None:
    records = [replace(record, device="cpu", gpu=None, cores=1) for record in launch_of_four()]
    assert [finding.check for finding in findings_of(records)] == ["cores", "cores"]  # of either host
    assert {finding.severity for finding in findings_of(records)} == {"warning"}


def test_what_all_ranks_found_is_reported_once() -> None:
    finding = Finding("error", "disk", "full", "delete")
    assert merge([(0, finding), (1, finding)], 2) == [finding]
    assert [found.what for found in merge([(0, finding), (1, finding)], 3)] == ["ranks 0-1: full"]


def test_slow_ranks_are_listed() -> None:
    records = launch_of_four()
    # the median of 100, 100, 100, 49 is 100; half of it is 50
    speeds = {rank: Speed(fp32_gflops=49 if rank == 3 else 100, bf16_gflops=100) for rank in range(4)}
    assert only(speed_findings(records, speeds)).what.startswith("rank 3 on two does 49 GFLOP/s in fp32")
    assert speed_findings(records, {rank: Speed(51 if rank == 3 else 100, 1) for rank in range(4)}) == []
    assert speed_findings(records, {}) == []


def test_rank_lists() -> None:
    assert rank_list([3]) == "rank 3"
    assert rank_list([7, 0, 1, 3, 2]) == "ranks 0-3, 7"


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launch", "what"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE, MASTER_ADDR"),
        ({"SLURM_NTASKS": "x"}, "SLURM_NTASKS=x: not a whole number"),
        ({"GROUP_WORLD_SIZE": ""}, "GROUP_WORLD_SIZE=(empty): not a whole number"),
        (PLACED | {"WORLD_SIZE": "many"}, "WORLD_SIZE=many: not a whole number"),
        (PLACED | {"RANK": "4"}, "RANK=4, but WORLD_SIZE=4"),
    ],
)
def test_an_invalid_place(launch: dict[str, str], what: str) -> None:
    assert only(place_findings(launch)).what.startswith(what)


def test_a_complete_place_is_valid() -> None:
    assert place_findings(PLACED) == place_findings({}) == []
    assert launch_findings(PLACED, {}) == launch_findings({}, {}) == []


AGENT = PLACED | {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}


@pytest.mark.parametrize(
    ("launch", "parent", "what"),
    [
        (AGENT, AGENT, "the launcher of this process was itself started by a launcher, as rank 1 of 4"),
        (AGENT | {"SLURM_STEP_NUM_TASKS": "2"}, {}, "srun started 2 tasks, and each its own launcher, which knows of 1"),
        (AGENT | {"ACCELERATE_MIXED_PRECISION": "no", "SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "2",
                  "SLURM_NODEID": "1"}, {}, "machine rank 0 on the node with SLURM_NODEID=1"),
    ],
)  # fmt: skip
def test_launches_that_are_not_what_was_meant(launch: dict[str, str], parent: dict[str, str], what: str) -> None:
    assert only(launch_findings(launch, parent)).what.startswith(what)


def test_launches_that_are_meant() -> None:
    assert launch_findings(AGENT, {"RANK": "0"}) == []  # a shell that has RANK is no launcher
    two_agents = AGENT | {"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "2", "SLURM_PROCID": "1"}
    assert launch_findings(two_agents, {}) == []
    assert not is_one_of_many_worlds(two_agents)


def test_copies_of_one_run_know_that_they_are() -> None:
    assert is_one_of_many_worlds({"SLURM_NTASKS": "4"})
    assert is_one_of_many_worlds({"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"})
    assert is_one_of_many_worlds(AGENT | {"SLURM_STEP_NUM_TASKS": "2"})
    assert not is_one_of_many_worlds({})
    assert not is_one_of_many_worlds({"SLURM_NTASKS": "x"})
    assert not is_one_of_many_worlds(PLACED | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"})


@pytest.mark.parametrize(
    ("variables", "uses_nccl", "severity"),
    [
        ({"GLOO_SOCKET_IFNAME": "nosuch0", "WORLD_SIZE": "2"}, False, "error"),
        ({"GLOO_SOCKET_IFNAME": "nosuch0"}, False, "warning"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, False, "warning"),  # gloo takes whole names, NCCL their beginnings
        ({"NCCL_SOCKET_IFNAME": "ib", "WORLD_SIZE": "2"}, True, "error"),
        ({"NCCL_SOCKET_IFNAME": "=eth", "WORLD_SIZE": "2"}, True, "error"),
        ({"NCCL_SOCKET_IFNAME": "ib", "WORLD_SIZE": "2"}, False, None),
        ({"NCCL_SOCKET_IFNAME": "eth,ib"}, True, None),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, True, None),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, True, None),
        ({}, True, None),
    ],
)
def test_network_interfaces(variables: dict[str, str], uses_nccl: bool, severity: str | None) -> None:
    found = socket_findings(variables, ["lo", "eth0"], uses_nccl)
    assert [finding.severity for finding in found] == ([severity] if severity else [])


def test_disk_space_is_bytes_and_inodes() -> None:
    assert disk_findings(DiskSpace("runs", 10**9, 10**6), 10**8, "a run", "make room") == []
    assert disk_findings(DiskSpace("runs", 10**9, None), 10**8, "a run", "make room") == []
    full = only(disk_findings(DiskSpace("runs", 10**9, 10**6), 2 * 10**9, "4 checkpoints", "make room"))
    assert full.what == "runs: 1,000 MB free, 2,000 MB needed for 4 checkpoints"
    assert "only 3 more files" in only(disk_findings(DiskSpace("runs", 10**12, 3), 0, "a run", "make room")).what


def test_bf16_without_units_is_a_warning() -> None:
    without, with_units = Cpu("Old", "AVX2", ""), Cpu("New", "AVX-512", "AMX")
    assert only(precision_findings("bf16", "cpu", without)).severity == "warning"
    assert precision_findings("bf16", "cpu", with_units) == precision_findings("auto", "cpu", without) == []
    assert precision_findings("bf16", "cuda", without) == []


def test_errors_become_what_and_remedy() -> None:
    finding = Finding.from_error("data", InputError("no shards in x: no folder. Write them with y"), "z")
    assert (finding.what, finding.remedy) == ("no shards in x: no folder", "write them with y")
    several = Finding.from_error(
        "data", InputError.from_problems("x does not match", ["a is cut off", "b is missing"]), "z"
    )
    assert (several.what, several.remedy) == ("x does not match: 2 problems: a is cut off; b is missing", "z")
    assert Finding.from_error("world", RuntimeError("bad\nstack"), "z").what == "RuntimeError: bad"
    assert Finding.from_error("world", RuntimeError(), "z").what == "RuntimeError: no message"


def test_a_loopback_address_for_several_hosts_is_what_keeps_them_apart() -> None:
    record = RankReport("two", rank=2, world_size=4, local_world_size=2, launch=PLACED)
    assert "the name of the first host" in unmet_finding(record, "refused", 3, is_loopback=True).remedy
    assert "the name of the first host" not in unmet_finding(record, "", 3, is_loopback=False).remedy
    assert "eth0 on two" in world_remedy(launch_of_four())


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: Xeon\nflags\t\t: avx avx2 avx512f avx512_bf16 amx_bf16\n", Cpu("Xeon", "AVX-512", "AMX")),
        ("model name\t: EPYC\nflags\t\t: avx avx2\n", Cpu("EPYC", "AVX2", "")),
        ("Features\t: fp asimd bf16\n", Cpu(parse_cpu("").name, "NEON", "NEON")),
        ("", Cpu(parse_cpu("").name, "", "")),
    ],
)
def test_processors(text: str, expected: Cpu) -> None:
    assert parse_cpu(text) == expected


def test_the_way_to_this_machine_is_its_loopback() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None
    assert "lo" in interfaces()


def test_write_access_is_tried_and_leaves_nothing(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    assert write_problem(tmp_path / "run" / "deep") is None
    assert write_problem(tmp_path) is None
    assert "is a file" in str(write_problem(tmp_path / "file" / "run"))
    assert "no file can be created in /proc" in str(write_problem(type(tmp_path)("/proc/run")))  # root cannot, either
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
