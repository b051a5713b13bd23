"""List the recipes that come with shardstep: what each is for, and the result that was measured with it.

shardstep recipes
"""

import argparse
import itertools
import re
import textwrap
from pathlib import Path

from shardstep.configs.load import find_recipe, recipe_names
from shardstep.launch.cli import page_width, run_script


def main(arguments: list[str]) -> int:
    """List the recipes; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="shardstep recipes",
        description="List the recipes that come with shardstep, each with its measured result.",
        epilog="`shardstep train NAME` trains one; `shardstep train NAME --show-config` prints it in full.",
    )
    parser.parse_args(arguments)
    names = recipe_names()
    indent = 2 + max(map(len, names))
    for name in names:
        texts = (text.replace(" %", "\xa0%").replace("n = ", "n\xa0=\xa0") for text in read_head(find_recipe(name)))
        lines = [line for text in texts for line in textwrap.wrap(text, page_width() - indent)]
        print(f"{name:<{indent}}" + f"\n{'':<{indent}}".join(lines).replace("\xa0", " "))
    return 0


def read_head(path: Path) -> tuple[str, str]:
    """Return what a recipe is and what was measured with it, from its head comment.

    A head is a paragraph on what the recipe is, one with its command, and one that begins with "HARDWARE, VERSIONS: RESULT."
    or "Not yet run". The first sentences count.
    """
    head = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    what, _, *rest = "\n".join(line[1:].removeprefix(" ") for line in head).split("\n\n")
    measured = _first_sentence(rest[0])
    if not measured.startswith("Not yet run"):
        hardware, _, result = measured.partition(": ")
        measured = f"measured: {result}; on {hardware}"
    return _first_sentence(what), measured


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.?])\s+(?=[A-Z])", " ".join(text.split()))[0].rstrip(".")


if __name__ == "__main__":
    run_script(main)
