"""Fixtures: small data sets made once, and folders for the cache and the state that are the tests' own."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardstep.datasets.write import write_shards
from tests.browser import Browser, find_browser, open_browser

ROOT = Path(__file__).parent.parent

# A shell starts background jobs with Ctrl-C ignored, and all processes that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["SHARDSTEP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    del os.environ["SHARDSTEP_CACHE"], os.environ["XDG_STATE_HOME"]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (101 synthetic images in shards of 17) and test/ (53 in shards of 20). Read only."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards("synthetic:101", "train", folder / "train", samples_per_shard=17)
    write_shards("synthetic:53", "test", folder / "test", samples_per_shard=20)
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A real browser; the test is skipped where there is none."""
    if not find_browser():
        pytest.skip("no Chromium here: pages are not looked at (apt-get install chromium)")
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(scope="session")
def cifar10_source() -> Path:
    """The folder that CIFAR10_SOURCE names; the test is skipped where there is none."""
    source = os.environ.get("CIFAR10_SOURCE")
    if not source:
        pytest.skip("CIFAR10_SOURCE is not set: no real images here")
    return Path(source)


@pytest.fixture(scope="session")
def finished_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs of a small convolutional network on `shards`. Read only; copy it to change it."""
    from tests.runs import train_ranks, write_recipe

    folder = tmp_path_factory.mktemp("finished")
    model = {"name": "whitening_cnn", "widths": [8]}
    train_ranks(1, write_recipe(folder, shards, model=model, log={"every": "2 steps"}), pictures=True)
    return folder / "run"
