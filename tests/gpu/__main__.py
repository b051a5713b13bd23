"""Run everything that only a GPU can show, in at most ten minutes, and write what came out as JSON and as a page.

    python -m tests.gpu [--out gpu-results] [--total-s 600]

The parts are ordered by worth. Each runs in processes of its own and has a time limit; one that fails or takes too long does
not stop the others. The results are written after every part, so that whatever ends this leaves what was reached. Without a
GPU the same parts run on the CPU, as small as they can be: that shows that they run, and nothing about a GPU.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

OPTIONAL = {"wandb"}


def main(arguments: list[str]) -> int:
    """Run all parts; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--total-s", type=float, default=600, help="seconds for everything (default: %(default)g)")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    missing = missing_packages()
    if missing:
        print(f"error: {sys.executable} lacks {', '.join(missing)}: install them there", file=sys.stderr)
        return 2

    import torch

    from tests.gpu.parts import parts
    from tests.gpu.session import Session

    is_rehearsal = not torch.cuda.is_available()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shardstep-gpu-") as scratch:
        session = Session(args.out, Path(scratch), began, args.total_s, is_rehearsal)
        return session.run(parts(Path(scratch), is_rehearsal))


def missing_packages() -> list[str]:
    """Return which packages that shardstep and its tests need are not installed here."""
    requirements = [text for text in metadata.requires("shardstep") or [] if "extra ==" not in text]
    needed = {re.split(r"[^\w.-]", text)[0] for text in requirements} - OPTIONAL | {"pytest"}
    return sorted(name for name in needed if not any(metadata.distributions(name=name)))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # a normal shutdown can abort with torch's threads
