"""requirements.lock holds everything that setup.cfg asks for, each with the hashes that pip checks, and names no host."""

import configparser
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

LOCK = (ROOT / "requirements.lock").read_text()
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
EXTRAS = SETUP["options.extras_require"]
BUILD = re.findall(r'"(setuptools>[^"]*)"', (ROOT / "pyproject.toml").read_text())  # there is no build isolation
NEEDED = [SETUP["options"]["install_requires"], *(EXTRAS[extra] for extra in ("digits", "tensorboard", "dev")), *BUILD]


def pins() -> dict[str, list[tuple[str, int]]]:
    """The versions of each package, which may depend on Python's, with how many hashes each has."""
    found: dict[str, list[tuple[str, int]]] = {}
    for entry in re.split(r"\n(?=[a-z0-9])", LOCK):
        if match := re.match(r"([\w.-]+)==(\S+)", entry):
            hashes = len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry))
            found.setdefault(canonicalize_name(match[1]), []).append((match[2], hashes))
    return found


@pytest.mark.parametrize("needed", [line for text in NEEDED for line in text.split()])
def test_what_setup_cfg_asks_for_is_locked(needed: str) -> None:
    requirement = Requirement(needed)
    versions = [version for version, _ in pins()[canonicalize_name(requirement.name)]]
    assert versions
    assert all(requirement.specifier.contains(version) for version in versions), "run `make lock`"


def test_every_locked_package_has_hashes() -> None:
    assert len(pins()) > 100
    assert not [name for name, versions in pins().items() if not all(hashes for _, hashes in versions)]


def test_the_lock_names_no_host_and_no_folder() -> None:
    assert not re.findall(r"://|--(?:extra-)?index|--find-links|@ |^/|/home/|/tmp/", LOCK, flags=re.MULTILINE)
