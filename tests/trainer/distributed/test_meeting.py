"""Before ranks meet: a name that resolves late or never, a port where nobody listens; each is waited for aloud."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from shardstep.configs.errors import InputError
from shardstep.trainer.distributed import meeting
from tests.distributed import free_port, run_ranks
from tests.runs import failure_of, write_recipe

KEEPER = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_SILENCE_S", 0.05)


def test_a_name_that_appears_late(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As in Kubernetes, where the name of a pod appears after the pod has started."""
    asked, resolve = [], socket.getaddrinfo

    def appear_late(host: str, *more: Any, **options: Any) -> Any:
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", appear_late)
    meeting.wait_for_store(KEEPER, 60)
    assert len(asked) == 3
    assert capsys.readouterr().err == "rank 0 waits for the name MASTER_ADDR=localhost to resolve, at most 60 s\n"


@pytest.mark.parametrize("name", ["nosuch.invalid", "a" * 64, "a..b", "-", "node-[1-2]"])
def test_a_name_that_never_resolves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"does not resolve on .*: .+\. Set it to the name or address") as raised:
        meeting.wait_for_store(KEEPER | {"MASTER_ADDR": name}, 0.3)
    assert not raised.value.everywhere  # another machine may know it
    assert f"MASTER_ADDR={name} to resolve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "keeps"),
    [
        (KEEPER, True),
        (KEEPER | {"RANK": "1"}, False),
        (KEEPER | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, False),  # torchrun's agent keeps it
        (KEEPER | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, True),
    ],
)
def test_only_the_keeper_of_the_store_does_not_wait_for_its_port(environment: dict[str, str], keeps: bool) -> None:
    environment = environment | {"MASTER_PORT": str(free_port())}
    assert meeting.keeps_store(environment) == keeps
    if keeps:
        meeting.wait_for_store(environment, 0.2)
        return
    with pytest.raises(TimeoutError, match="Connection refused"):
        meeting.wait_for_store(environment, 0.2)
    with socket.create_server(("localhost", int(environment["MASTER_PORT"]))):
        meeting.wait_for_store(environment, 60)


def test_who_meets_at_once_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(meeting, "_SILENCE_S", 60)
    meeting.wait_for_store(KEEPER, 60)
    assert capsys.readouterr() == ("", "")


def train_towards(name: str, rank: str, recipe: str) -> tuple[int, str, str]:
    """Runs in a rank: train in a world of two whose first machine has this name."""
    meeting._SILENCE_S = 0.05
    os.environ.update(MASTER_ADDR=name, RANK=rank, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", WORLD_SIZE="2")
    return failure_of(recipe, "train.timeout_s=1", "run.hang_timeout=null")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_run_towards_a_name_that_never_resolves(rank: str, shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards))
    ((code, _, stderr),) = run_ranks(1, train_towards, "nosuch.invalid", rank, recipe)
    assert code == 2
    waits, refused = stderr.splitlines()
    assert waits == f"rank {rank} waits for the name MASTER_ADDR=nosuch.invalid to resolve, at most 1 s"
    assert refused.startswith("error: MASTER_ADDR=nosuch.invalid does not resolve on ")
    assert not (tmp_path / "run").exists()
