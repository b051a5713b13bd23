"""The copy of a recipe's own code in a run's folder: written by a run, compared by a resume, trusted by those who open it.

Whoever opens a run's folder runs the code in it, so a folder that comes from elsewhere could run anything. Only code that
this user has trained with on this machine runs: a line for each is in `known_code`, in the user's folder for state.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from shardstep.configs.errors import InputError
from shardstep.configs.files import write_atomically
from shardstep.configs.recipe_code import Code, code_of, imported_files, names_of_code, origin_of
from shardstep.configs.schema import Recipe
from shardstep.trainer.distributed.collectives import broadcast_object, raise_on_all_ranks

_trusted_here: set[str] = set()  # by this process, where the user's folder cannot be written
_SHOWN = 12  # digits of a sha256 in messages


def keep_code(recipe: Recipe, folder: Path, record: Path) -> str | None:
    """Write the code of a recipe with places to a run's folder, in place of what is there; return a warning, if any. Rank 0.

    Args:
        folder: for the files.
        record: for names, sha256 and versions.
    """
    code = code_of(recipe)
    if not code.names:
        return None
    files = imported_files(recipe)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(folder)) not in files:
            path.unlink()
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
    write_atomically(record, code.to_json())
    return _trust(code)


def check_same_code(world: PartialState, recipe: Recipe) -> None:
    """Check that every rank has imported the same code. All ranks.

    Raises:
        InputError: a file or a package of a rank differs from rank 0's.
    """
    own = code_of(recipe)
    first: Code = broadcast_object(world, own)
    with raise_on_all_ranks(world):
        if differences := describe_changes(first, own):
            raise InputError(f"this rank has other code than rank 0: {differences[1]} instead of {differences[0]}")


def code_changes(recipe: Recipe, record: Path) -> tuple[str, str] | None:
    """Return how a recipe's code differs from that of a run's record, before and now; None where it does not."""
    before = read_code(record)
    if before is None:
        return None
    now = code_of(recipe)
    imported_later = {
        path: digest
        for path in before.files
        if path not in now.files and (digest := _digest_of(origin_of(recipe, path))) is not None
    }
    return describe_changes(before, replace(now, files=now.files | imported_later))


def describe_changes(before: Code, now: Code) -> tuple[str, str] | None:
    """Return the files and packages of `before` that are others or missing now, as text of then and now; None for none."""
    then, since = _facts(before), _facts(now)
    changed = [name for name, fact in then.items() if since.get(name) != fact]
    if not changed:
        return None
    return tuple(", ".join(f"{name} ({facts.get(name, 'missing')})" for name in changed) for facts in (then, since))  # type: ignore[return-value]


def _facts(code: Code) -> dict[str, str]:
    return {path: f"sha256 {digest[:_SHOWN]}" for path, digest in code.files.items()} | code.packages


def read_code(record: Path) -> Code | None:
    """Read the record of a run's code; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    try:
        return Code(**json.loads(record.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        raise InputError(f"{record} is damaged, or of another version of shardstep") from None


def check_trusted(recipe: Recipe, folder: Path) -> None:
    """Check, before it runs, that the code which a run's config.yaml names is known. `folder`: the run's code folder.

    Raises:
        InputError: this user has not trained with it on this machine; the message has the files, and --trust-code.
    """
    code = _found_code(recipe, folder)
    if not code.names or code.digest in _trusted_here or code.digest in _known():
        return
    files = ", ".join(f"{folder / path} (sha256 {digest[:_SHOWN]})" for path, digest in code.files.items())
    raise InputError(
        f"{folder.parent} runs {' and '.join(code.names)}, which you have not trained with on this machine. Read "
        f"{files or 'its config.yaml'}; if you trust this code, give --trust-code once"
    )


def trust_code(recipe: Recipe, folder: Path) -> str | None:
    """Make the code that a run's config.yaml names known; return a line that says so, None where it names none."""
    code = _found_code(recipe, folder)
    if not code.names:
        return None
    return (
        _trust(code) or f"trusted from now on: {', '.join([*code.names, *(str(folder / path) for path in code.files)])}"
    )


def _found_code(recipe: Recipe, folder: Path) -> Code:
    """Return the code that would run: the names of a config.yaml, and every file that they could import."""
    names = names_of_code(recipe)
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if names else []
    files = {str(path.relative_to(folder)): _digest_of(path) or "" for path in paths}
    return Code(sorted(names), files)


def _digest_of(path: Path | None) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path else None
    except OSError:
        return None


def _known_path() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "shardstep" / "known_code"


def _known() -> set[str]:
    try:
        return {line.partition(" ")[0] for line in _known_path().read_text().splitlines()}
    except (OSError, RuntimeError, ValueError):  # RuntimeError: this user has no home
        return set()


def _trust(code: Code) -> str | None:
    """Make code known to this process, and to later ones of this user; return a warning if those will not know it."""
    _trusted_here.add(code.digest)
    if code.digest in _known():
        return None
    try:
        path = _known_path()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("a") as file:  # one write of one line: several processes may append
            file.write(f"{code.digest} {' '.join(code.names)}\n")
    except (OSError, RuntimeError) as error:
        return f"the code could not be made known ({error}): `evaluate` and others will ask for --trust-code"
    return None
