"""`import shardstep`: the commands as functions. They leave the caller's process as it is, and lose nothing at Ctrl-C."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml

import shardstep
from shardstep.launch.python.child import run_command as run_script
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.monitoring.display_events import EventDisplay, show
from tests.datasets.test_sources import png
from tests.distributed import HANG_S, run_command
from tests.runs import train_lines, write_recipe


def sections(folder: Path, shards: Path, **changed: dict[str, Any]) -> dict[str, Any]:
    """The recipe of `write_recipe`, as a program would write it."""
    found = yaml.safe_load(write_recipe(folder, shards, **changed).read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> shardstep.LoadedRun:
    """A run of two epochs of four steps, too slow to become perfect, trained by a call."""
    return shardstep.train(sections(tmp_path_factory.mktemp("trained"), shards), "optimizer.lr=0.001")


# --- the package's root -------------------------------------------------------------------------------------------


def test_the_root_is_light_and_has_what_it_promises() -> None:
    code = "import sys, shardstep; print([n for n in sys.modules if n.startswith(('shardstep', 'torch', 'omegaconf'))])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert result.stdout == "['shardstep']\n"
    assert shardstep.__version__ == metadata.version("shardstep")
    assert set(shardstep.__all__) <= set(dir(shardstep))
    assert all(getattr(shardstep, name) for name in shardstep.__all__)
    with pytest.raises(AttributeError, match="'shardstep' has no attribute 'trian'"):
        _ = shardstep.trian


# --- training -----------------------------------------------------------------------------------------------------


def test_a_call_trains_what_the_command_does(trained: shardstep.LoadedRun, shards: Path, tmp_path: Path) -> None:
    assert run_command("train", str(write_recipe(tmp_path, shards)), "optimizer.lr=0.001", cwd=tmp_path).returncode == 0
    losses = [row["loss"] for row in trained.metrics if row["kind"] == "train"]
    assert losses == [line["loss"] for line in train_lines(tmp_path / "run")]
    assert trained.state == trained.summary["status"] == "finished"
    assert trained.step == len(losses) == 8  # 2 epochs of ceil(101 / 30) = 4
    assert trained.config["optimizer"]["name"] == "sgd"
    assert (
        repr(trained) == f"<run {trained.folder}: finished, step 8, accuracy {trained.summary['eval']['accuracy']:.2%}>"
    )


def test_output_is_shown_once_and_in_order(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, shards)
    run = shardstep.train(recipe, "train.duration=1 epochs", "data.last_batch=drop", nproc=2)
    out, err = capfd.readouterr()
    assert run.summary["world_size"] == 2
    assert run.folder == tmp_path / "run"
    assert [out.count(text) for text in ("world      2 ranks", "epoch 1 ", "done: test accuracy", "\x1e")] == [
        1,
        1,
        1,
        0,
    ]
    assert out.index("world ") < out.index("done: ") < out.index("are in ")
    assert not err


def test_the_process_stays_as_it_was(shards: Path, tmp_path: Path) -> None:
    def state() -> list[Any]:
        numbers = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        accelerate = sys.modules.get("accelerate.state")
        worlds = [torch.distributed.is_initialized(), dict(accelerate.PartialState._shared_state) if accelerate else {}]
        return [*numbers, *handlers, *worlds, torch.get_num_threads(), dict(os.environ), os.getcwd(), sys.path[:]]

    before = state()
    run = shardstep.train(sections(tmp_path, shards), "train.duration=1 steps")
    (tmp_path / "a.png").write_bytes(png(1))
    shardstep.predict(run, tmp_path / "a.png")
    assert run.model
    run.mistakes()
    shardstep.evaluate(run)
    assert state() == before


@pytest.mark.parametrize(
    ("recipe", "overrides", "nproc", "message"),
    [
        ("smok", [], 1, "no recipe 'smok': neither a file nor a built-in recipe; did you mean smoke?"),
        (Path("there/is/none.yaml"), [], 1, "no recipe 'there/is/none.yaml'"),
        (7, [], 1, "7 is not a recipe: give a name, a path, or a mapping of sections"),
        ("smoke", [3], 1, "3 is not an override: give text such as 'optimizer.lr=0.1'"),
        ("smoke", ["--show-config"], 1, "recipe smoke: '--show-config' is not of the form section.key=value"),
        ("smoke", ["--nproc=2"], 1, "recipe smoke: '--nproc=2' is not of the form section.key=value"),
        ("smoke", ["optimzer.lr=1"], 1, "recipe smoke: optimzer is not a section; did you mean optimizer?"),
        (
            "smoke",
            ["train.durat=1", "optimizer.lrr=1"],
            1,
            "2 problems\n  - train.durat is not.*\n  - optimizer.lrr is not",
        ),
        ("smoke", [], 0, "nproc=0 is not a number of ranks: give 1 or more"),
        ("smoke", [], "2", "nproc='2' is not a number of ranks"),
        ({"model": {"name": print}}, [], 1, "not <built-in function print>; a function of yours is named by its place"),
        ({"modl": {}}, [], 1, "recipe that was given: 3 problems\n  - modl is not a section; did you mean model?"),
        # Found by the process that trains:
        (
            {"model": {"name": "mlp", "hiden": 3}},
            [],
            1,
            "recipe that was given: 2 problems\n  - model.hiden is not",
        ),
        ("smoke", ["train.world_size=3"], 2, "train.world_size=3, but 2 ranks came up"),
    ],
)
def test_bad_input_is_an_error_and_nothing_is_written(
    recipe: Any,
    overrides: list[Any],
    nproc: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(shardstep.InputError, match=message):
        shardstep.train(recipe, *overrides, nproc=nproc)
    assert capfd.readouterr() == ("", "")  # the error alone says it
    assert not list(tmp_path.iterdir())


def test_failed_training_is_an_error_with_its_reason(shards: Path, tmp_path: Path) -> None:
    recipe = sections(tmp_path, shards, optimizer={"name": "sgd", "lr": 1e30})
    with pytest.raises(shardstep.TrainingFailed, match=r"^the loss is nan at step 2 .*Try a lower"):
        shardstep.train(recipe)
    run = shardstep.load_run(tmp_path / "run")
    assert run.state == "failed"
    assert run.summary["failure"] == "nonfinite"


def test_modules_are_found_where_the_caller_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").touch()
    (tmp_path / "finds.py").write_text("import my_models\nprint(my_models.__file__)\n")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [*sys.path, ""])  # the current folder, as a notebook has it
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    run_script(tmp_path / "finds.py", [], lines.append, lines.append)
    assert lines == [str(tmp_path / "my_models.py")]


# --- stopping -----------------------------------------------------------------------------------------------------

CALL = """
import signal, sys, shardstep
handler = signal.getsignal(signal.SIGINT)
overrides = ["train.duration=" + sys.argv[2], "run.allow_changes=[train.duration]"]
run = shardstep.train(sys.argv[1], *overrides, nproc=int(sys.argv[3]))
assert signal.getsignal(signal.SIGINT) is handler
print("returned", run.state, run.step, flush=True)
"""


def call(recipe: Path, duration: str, nproc: int) -> subprocess.Popen[str]:
    """Start a program that trains; it writes what `train` shows and returns."""
    return subprocess.Popen(
        [sys.executable, "-c", CALL, str(recipe), duration, str(nproc)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(what: Path, process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + HANG_S
    while not (what.exists() and what.stat().st_size):
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process and process.stdout and process.stdout.read()
        time.sleep(0.05)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.drill)])
def test_ctrl_c_saves_and_returns_and_the_same_call_goes_on(nproc: int, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    process = call(recipe, "1000000 steps", nproc)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal and Jupyter send it
    output, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, output
    *_, last = output.splitlines()
    word, state, step = last.split()
    assert (word, state) == ("returned", "stopped")
    assert "Traceback" not in output
    assert f"stopped by SIGINT: step {step} is saved" in output
    again = call(recipe, f"{int(step) + 3} steps", nproc)
    output, _ = again.communicate(timeout=HANG_S)
    assert output.splitlines()[-1] == f"returned finished {int(step) + 3}"
    assert [line["step"] for line in train_lines(tmp_path / "run")] == list(range(1, int(step) + 4))  # each once


@pytest.mark.drill
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_whose_caller_is_killed_saves_and_ends(nproc: int, shards: Path, tmp_path: Path) -> None:
    process = call(write_recipe(tmp_path, shards), "1000000 steps", nproc)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.kill()
    process.communicate()
    wait_for(tmp_path / "run" / "summary.json")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "preempted"
    deadline = time.monotonic() + HANG_S
    while shardstep.load_run(tmp_path / "run").state == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("delay_s", [0, 0.02, pytest.param(0.1, marks=pytest.mark.drill)])
def test_ctrl_c_before_training_is_keyboard_interrupt(delay_s: float, shards: Path, tmp_path: Path) -> None:
    process = call(write_recipe(tmp_path, shards), "1000000 steps", 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text():
        time.sleep(0.001)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=HANG_S)
    assert output.splitlines()[-1] == "KeyboardInterrupt"
    assert output.count("Traceback") == 1  # the caller's
    assert not (tmp_path / "run").exists()
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in commands if str(tmp_path / "recipe.yaml") in words]


def test_a_killed_command_is_an_error_though_its_children_hold_its_output(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(
        "import os, signal, subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    lines: list[str] = []
    with pytest.raises(shardstep.TrainingFailed, match=r"^killed was killed by SIGKILL; what it printed says more$"):
        run_script(tmp_path / "killed.py", [], lines.append, lines.append)
    os.kill(int(lines[0]), signal.SIGKILL)


@pytest.mark.parametrize(
    ("stderr", "code", "error", "told"),
    [
        ("error: two\nlines", 2, "two\nlines", []),
        ("warning: a\nerror: b\nwarning: c", 2, "b", ["warning: a", "warning: c"]),
        ("failed: first\nfailed: rank 1 ends because another rank has ended", 1, "first", ["failed: rank 1 ends"]),
        (
            "Traceback\nValueError: x",
            1,
            "fails ended with exit code 1; what it printed says more",
            ["Traceback", "Value"],
        ),
        ("usage: x", 2, "fails has refused its input; what it printed says why", ["usage: x"]),
    ],
)
def test_the_error_that_a_command_ends_with_is_raised(
    stderr: str, code: int, error: str, told: list[str], tmp_path: Path
) -> None:
    (tmp_path / "fails.py").write_text(f"import sys\nprint({stderr!r}, file=sys.stderr)\nsys.exit({code})\n")
    lines: list[str] = []
    with pytest.raises(shardstep.InputError if code == 2 else shardstep.TrainingFailed) as raised:
        run_script(tmp_path / "fails.py", [], lines.append, lines.append)
    assert str(raised.value) == error
    assert [line.startswith(start) for line, start in zip(lines, told, strict=True)] == [True] * len(told)


# --- finished runs ------------------------------------------------------------------------------------------------


def test_evaluate_returns_what_the_command_prints(
    trained: shardstep.LoadedRun, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shardstep.evaluate(trained, data=shards / "train", device="cpu")
    printed = run_command("evaluate", str(trained.folder), "--data", str(shards / "train"), cwd=shards).stdout
    assert found == json.loads(printed.splitlines()[-1])
    assert found["samples"] == 101
    assert capsys.readouterr().out == ""
    (checkpoint, *_) = sorted((trained.folder / "checkpoints").iterdir())
    assert shardstep.evaluate(str(checkpoint))["samples"] == 53


def test_predict_returns_what_the_command_prints(
    trained: shardstep.LoadedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "cut.png").write_bytes(png(1)[:40])
    found = shardstep.predict(trained, tmp_path / "0.png", tmp_path, top=2)
    assert f"left out: {tmp_path / 'cut.png'}: " in capsys.readouterr().err
    printed = run_command(
        *("predict", str(trained.folder), str(tmp_path / "0.png"), str(tmp_path), "--top", "2", "--json"), cwd=tmp_path
    ).stdout
    assert found == [json.loads(line) for line in printed.splitlines()]
    assert [Path(row["file"]).name for row in found] == ["0.png", "0.png", "1.png", "2.png"]


def test_a_run_has_its_model_and_its_mistakes(trained: shardstep.LoadedRun) -> None:
    height, width, channels = 32, 32, 3
    pixels = torch.zeros(2, height, width, channels, dtype=torch.uint8)
    with torch.inference_mode():
        assert trained.model(trained.normalize(pixels)).shape == (2, len(trained.classes))
    assert not trained.model.training
    mistakes = trained.mistakes()
    wrong = round((1 - trained.summary["eval"]["accuracy"]) * 53)
    assert len(mistakes) == min(24, wrong) > 0
    assert all(mistake.label != mistake.predicted for mistake in mistakes)
    assert [mistake.confidence for mistake in mistakes] == sorted((m.confidence for m in mistakes), reverse=True)


def test_the_frame_has_the_rows(trained: shardstep.LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(shardstep.InputError, match=r"^frame\(\) needs pandas: pip install pandas\."):
        trained.frame()
    monkeypatch.undo()
    pytest.importorskip("pandas")
    frame = trained.frame()
    assert frame["loss"].tolist() == [row["loss"] for row in trained.metrics]
    assert frame[frame.kind == "eval"].step.tolist() == [4, 8]


@pytest.mark.drill
def test_a_config_is_a_recipe(trained: shardstep.LoadedRun, tmp_path: Path) -> None:
    again = shardstep.train(trained.config, f"run.dir={tmp_path / 'again'}")
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in trained.metrics]


@pytest.mark.parametrize("what", ["no folder", "a file", "no run", "no config"])
def test_what_is_no_run_is_refused(what: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    messages = {
        "no folder": f"there is no folder {place}",
        "a file": f"{place} is not a folder",
        "no run": f"{place} holds no run: it has no config.yaml",
        "no config": f"{place / 'config.yaml'} is incomplete: it has no model",
    }
    if what == "a file":
        place.touch()
    elif what != "no folder":
        place.mkdir()
    if what == "no config":
        (place / "config.yaml").write_text("{}")
    with pytest.raises(shardstep.InputError) as raised:
        shardstep.load_run(place)
    assert str(raised.value) == messages[what]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: shardstep.evaluate(run, device="gpu"), "device='gpu' is not a device: give auto, cpu or cuda"),
        (lambda run: shardstep.predict(run, "x", device="tpu"), "device='tpu' is not a device: give auto, cpu or cuda"),
        (lambda run: shardstep.predict(run, "x", top=0), "top=0 is not a number of classes: give 1 or more"),
        (lambda run: shardstep.predict(run, "nowhere.png"), "nothing could be predicted: 1 of 1 could not be read"),
        (lambda run: shardstep.predict(run), "predict needs image files, or folders of them"),
        (lambda run: shardstep.predict("nowhere", "x"), "nowhere is neither a run's folder nor a checkpoint of one"),
        (lambda run: shardstep.evaluate("--help"), "--help is neither a run's folder nor a checkpoint of one"),
        (lambda run: shardstep.evaluate(run, "nowhere"), "nowhere"),
    ],
)
def test_bad_input_of_finished_runs(call: Any, message: str, trained: shardstep.LoadedRun) -> None:
    with pytest.raises(shardstep.InputError, match=message):
        call(trained)


# --- what one process tells another -------------------------------------------------------------------------------

LINE = {"kind": "train", "step": 3, "total_steps": 9, "loss": 0.5}
EVENTS: list[tuple[str, tuple[Any, ...]]] = [
    ("note", ("two\nlines \x1e and \x1b", 4)),
    ("note", ("",)),
    ("start", (None, 3, 0.25)),
    ("advance", (4,)),
    ("line", (LINE,)),
    ("saved", (Path("run/checkpoints/step-00000003"),)),
    ("stop", ()),
]


def test_events_arrive_as_they_were_sent(capsys: pytest.CaptureFixture[str]) -> None:
    received: list[tuple[str, tuple[Any, ...]]] = []

    class Recorder(Display):
        def __getattribute__(self, name: str) -> Any:
            return (lambda *arguments: received.append((name, arguments))) if name in dict(EVENTS) else None

    sender = EventDisplay(enabled=True)
    for name, arguments in EVENTS:
        getattr(sender, name)(*arguments)
    for text in [*capsys.readouterr().out.strip("\n").split("\n"), "text of a library"]:
        show(Recorder(enabled=True), text)
    padded = [
        (name, (*arguments, 0) if name == "note" and len(arguments) == 1 else arguments) for name, arguments in EVENTS
    ]
    assert received == [*padded, ("note", ("text of a library",))]


def test_only_rank_0_sends(capsys: pytest.CaptureFixture[str]) -> None:
    sender = EventDisplay(enabled=False)
    for name, arguments in EVENTS:
        getattr(sender, name)(*arguments)
    assert capsys.readouterr() == ("", "")


def test_steps_are_sent_a_few_times_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    sender = EventDisplay(enabled=True)
    for step in range(1000):
        sender.advance(step)
    assert len(capsys.readouterr().out.splitlines()) < 100
