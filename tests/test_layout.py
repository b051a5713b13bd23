"""The layout's guards: what is installed under which name, and who may import whom."""

import ast
import configparser
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.distributed import PRELOAD

LAYERS = ["configs", "datasets", "trainer", "launch"]  # each may import from itself and from those before it


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


ROOMS = {
    # The rooms of the training path: the files at trainer's root use them, they use each other only as said here.
    "kernels": set(),
    "distributed": set(),
    "models": {"distributed"},
    "optim": {"distributed", "models"},
    "checkpoints": {"distributed"},
    "own_code": {"distributed", "optim"},
    "formats": {"kernels", "models", "optim"},
    "stopping": {"distributed"},
    "monitoring": set(),
    # The rooms of those who look at runs from outside: they use the training path, which knows nothing of them.
    "analysis": {"checkpoints", "models", "monitoring", "optim", "own_code", "root"},
    "doctor": {"distributed", "kernels", "monitoring", "root"},
}
FOR_ALL_ROOMS = {"state", "machine"}  # files at trainer's root that import nothing else of trainer


def rooms_imported(path: Path) -> set[str]:
    """The rooms of trainer/ that a file imports from; "root" for a file at its root that only the training path may use."""
    rooms = set()
    for module in imported_modules(path):
        parts = module.split(".")[2:]
        if module.startswith("shardstep.trainer.") and parts[0] not in FOR_ALL_ROOMS:
            rooms.add(parts[0] if parts[0] in ROOMS else "root")
    return rooms


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_down_only(layer: str) -> None:
    forbidden = {f"shardstep.{name}" for name in LAYERS[LAYERS.index(layer) + 1 :]}
    for path in python_files(layer):
        above = {name for name in imported_modules(path) for top in forbidden if (name + ".").startswith(top + ".")}
        assert not above, f"{path} imports {above}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    for path in python_files(f"trainer/{room}"):
        assert rooms_imported(path) - {room} <= ROOMS[room], path


def test_the_training_path_imports_no_room_that_looks_from_outside() -> None:
    outside = {room for room, allowed in ROOMS.items() if "root" in allowed}
    for path in (ROOT / "trainer").glob("*.py"):
        assert not rooms_imported(path) & outside, path


def test_every_room_is_listed_and_says_what_it_is_for() -> None:
    folders = {path.name for path in (ROOT / "trainer").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS)
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((ROOT / "trainer" / room / "__init__.py").read_text())) or ""
        assert "import" in text.lower(), f"{room}: its __init__.py says not what may import it, or what it imports"
    for name in FOR_ALL_ROOMS:
        assert not rooms_imported(ROOT / "trainer" / f"{name}.py"), name


def test_the_training_path_is_few_files() -> None:
    assert len(list((ROOT / "trainer").glob("*.py"))) <= 20


def test_no_two_modules_have_one_name() -> None:
    names = [path.stem for layer in LAYERS for path in python_files(layer) if path.stem != "__init__"]
    assert not {name for name in names if names.count(name) > 1}


def test_no_two_classes_have_one_name() -> None:
    names = [
        node.name
        for layer in LAYERS
        for path in python_files(layer)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not {name for name in names if names.count(name) > 1}


def test_only_distributed_touches_the_world() -> None:
    for layer in LAYERS:
        for path in python_files(layer):
            if path.parent.name == "distributed":
                continue
            assert not {name for name in imported_modules(path) if name.startswith("torch.distributed")}, path
            assert "Accelerator(" not in path.read_text(), path
            assert not re.search(r"environ\b.*(RANK|WORLD|MASTER|SLURM|ACCELERATE|TORCHELASTIC)", path.read_text()), (
                path
            )


def test_cores_are_counted_in_one_place() -> None:
    # Affinity alone, or the machine's number, would be more than a container's quota allows.
    for layer in LAYERS:
        for path in python_files(layer):
            counts = re.search(r"len\(os\.sched_getaffinity|cpu_count", path.read_text())
            assert not counts or path == ROOT / "configs" / "cores.py", path


def test_what_the_tests_ranks_preload_exists() -> None:
    # The forkserver skips what it cannot import, and each rank of each test would take the seconds of importing it.
    assert not [name for name in PRELOAD if importlib.util.find_spec(name) is None]


def test_datasets_has_no_init() -> None:
    # With one, and the repository root on the path, `import datasets` would find this folder instead of the library.
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_accelerate_does_not_take_our_folder_for_the_datasets_library() -> None:
    code = "from accelerate.utils import is_datasets_available; import accelerate; print(is_datasets_available())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert result.stdout.strip() == "False"


def test_nothing_generic_is_importable_from_elsewhere(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, shardstep.trainer.loop, shardstep.datasets.order;"
        "print([n for n in ('launch', 'trainer', 'configs', 'slurm') if u.find_spec(n)])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_scripts_are_not_named_after_installed_libraries(tmp_path: Path) -> None:
    # A script's folder comes first on sys.path: a launch/yaml.py would be everybody's yaml.
    names = [path.stem for path in python_files("launch") if path.stem != "__init__"]
    code = f"import importlib.util as u; print([n for n in {names!r} if u.find_spec(n)])"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_function_has_a_docstring() -> None:
    for layer in LAYERS:
        for path in python_files(layer):
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree), f"{path} has no docstring"
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def function_lengths(path: Path) -> dict[str, int]:
    """Lines of each function of a file, nested ones and methods included."""
    return {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def test_functions_are_short() -> None:
    for layer in LAYERS:
        for path in python_files(layer):
            most = 60 if path.parent == ROOT / "trainer" else 80
            long = {name: length for name, length in function_lengths(path).items() if length > most}
            assert not long, path


def test_loop_is_short() -> None:
    lengths = function_lengths(ROOT / "trainer" / "loop.py")
    assert lengths["train"] < 60, lengths
    assert sum(lengths.values()) < 100, lengths


def test_setup_imports_few_modules() -> None:
    tree = ast.parse((ROOT / "trainer" / "setup.py").read_text())
    assert sum(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree)) <= 25


def test_files_that_are_no_modules_are_installed_with_their_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = {package: text.split() for package, text in setup["options.package_data"].items()}
    listed = subprocess.run(["git", "ls-files", *LAYERS], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in map(Path, listed.stdout.splitlines()):
        packages = [
            (patterns.get(".".join(["shardstep", *folder.parts]), []), path.relative_to(folder))
            for folder in path.parents
        ]
        is_installed = any(name.match(pattern) for found, name in packages for pattern in found)
        assert path.suffix == ".py" or is_installed, f"{path} is in no package_data of setup.cfg"
