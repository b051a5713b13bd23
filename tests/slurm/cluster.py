"""A real Slurm on this machine for tests: four virtual nodes in a network and a PID space of their own.

cluster/ has the scripts that start and stop it. All of it lives below one process, and ends with it.
"""

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent / "cluster"
ENDED = {"CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT"}


def missing() -> str | None:
    """Why Slurm cannot run here; None if it can."""
    if os.geteuid() != 0:
        return "a virtual cluster needs root"
    absent = [name for name in ("slurmctld", "slurmd", "munged", "unshare", "nsenter", "ip") if not shutil.which(name)]
    if absent:
        return f"{', '.join(absent)} not installed (tests/slurm/cluster/up.sh --install)"
    own = subprocess.run(["getent", "hosts", socket.gethostname()], capture_output=True, text=True).stdout
    if not own.startswith("127."):
        return f"{socket.gethostname()} does not resolve to 127.x (/etc/hosts): Slurm would listen on the network"
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True, text=True
    )
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


class Cluster:
    """A running cluster."""

    def __init__(self, nodes: int = 4):
        self._folder = Path(tempfile.mkdtemp(prefix="shardstep-slurm-"))
        self._environment = os.environ | {
            "SLURMTEST_DIR": str(self._folder / "slurm"),
            "SLURMTEST_NODES": str(nodes),
            "SLURM_CONF": str(self._folder / "slurm" / "etc" / "slurm.conf"),
            "PYTHONDONTWRITEBYTECODE": "",
        }
        # It ends when its standard input does: with this process, however that ends.
        self._holder = subprocess.Popen(
            [str(HERE / "isolated.sh"), "bash", "-c", "echo ready; read line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self._init = children[0]  # the first process of the PID space
        try:
            self.sh([str(HERE / "up.sh")], timeout_s=60)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it, with all that runs in it."""
        self.sh([str(HERE / "down.sh")], check=False, timeout_s=30)
        self._holder.kill()
        self._holder.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def sh(
        self,
        command: list[str],
        cwd: Path | None = None,
        check: bool = True,
        timeout_s: float = 60,
        text: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the cluster's network, as on a login node."""
        inside = ["nsenter", "-t", self._init, "-n", "-p", "-m", f"--wd={cwd or Path.cwd()}", *command]
        result = subprocess.run(
            inside, env=self._environment, capture_output=True, text=True, timeout=timeout_s, input=text
        )
        assert not check or result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        return result

    def node(self, action: str, name: str) -> None:
        """Break or repair a node: crash, start, ... (see cluster/node.sh)."""
        self.sh([str(HERE / "node.sh"), action, name])

    def show(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, or of a task of an array ("12_0")."""
        found = self.sh(["scontrol", "-o", "show", "job", job]).stdout
        facts = {name: value for name, equals, value in (word.partition("=") for word in found.split()) if equals}
        return facts | {"StdOut": re.search(r"StdOut=(.*) Power=", found)[1]}  # type: ignore[index] # spaces and all

    def wait(
        self, job: str, until: Callable[[dict[str, str]], bool], what: str, timeout_s: float = 90
    ) -> dict[str, str]:
        """Wait until something holds of a job."""
        deadline = time.monotonic() + timeout_s
        while not until(facts := self.show(job)):
            assert time.monotonic() < deadline, (
                f"{what}: not after {timeout_s} s, {facts['JobState']} {facts['Reason']}\n{self.log(facts)}"
            )
            time.sleep(0.2)
        return facts

    def wait_end(self, job: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job has ended for good."""
        return self.wait(job, lambda facts: facts["JobState"] in ENDED, "its end", timeout_s)

    def wait_restart(self, job: str, restarts: int, timeout_s: float = 60) -> None:
        """Wait until a job runs again."""
        self.wait(
            job,
            lambda facts: facts["JobState"] == "RUNNING" and int(facts["Restarts"]) >= restarts,
            f"start {restarts + 1}",
            timeout_s,
        )

    def log(self, facts: dict[str, str]) -> str:
        """A job's log."""
        path = Path(facts.get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else ""
