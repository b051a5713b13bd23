"""The benchmarks run, on tiny inputs, and say what they promise; how fast anything is, is not tested."""

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from shardstep.configs.durations import Duration, Progress
from shardstep.launch import bench
from shardstep.launch.benchmarks import bench_tables, photographs, record_script
from shardstep.launch.benchmarks.bench_record import script_plan
from shardstep.launch.benchmarks.bench_step import _in_own_process
from shardstep.launch.benchmarks.bench_tables import Table, as_json, importable, in_turn, paired_ratios, print_table
from shardstep.launch.cli import run
from shardstep.trainer.models.whitening_cnn import WhiteningCnn, whitening_cnn
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.optim.schedules import LearningRate

TINY = {
    "loader": ["--samples", "40", "--jpegs", "4"],
    "step": ["--batches", "8", "--images", "16", "--precision", "fp32"],
    "convolutions": ["--precision", "bf16", "--images", "2", "--layers", "32,128,12", "128,128,3"],
    "checkpoint": ["--steps", "3"],
    "startup": ["--clock", "cpu"],
    "record": ["smoke", "train.duration=2 steps", "--script", "train.global_batch_size=50"],
}
ROWS = {  # those that need nothing but our own requirements
    "loader": ["resident: gather, flip, translate, normalise", "stream: decode, flip, translate, normalise",
               "torchvision ImageFolder + DataLoader", "webdataset, torchvision transforms, DataLoader",
               "stream: index, pread, crc32, decode", "the files one after the other", "stream, all shards shuffled together",
               "first start: decode and keep", "later start: check and map"],
    "step": ["bare loop", "shardstep"],
    "convolutions": ["direct", "winograd", "unfold"],
    "checkpoint": ["no checkpoint", "a checkpoint every 50 steps"],
    "startup": ["import torch", "shardstep --help", "smoke: a small recipe, to its first step"],
    "record": ["smoke", "smoke: initialisation, training and evaluation", "smoke: training",
               "smoke: evaluation, with all views", "a script", "a script: training"],
}  # fmt: skip


DRILL = {False: [], True: [pytest.mark.drill]}  # startup compiles torch's Python files first


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its shards to the collector
@pytest.mark.parametrize("name", [pytest.param(name, marks=DRILL[name == "startup"]) for name in TINY])
def test_a_benchmark_runs_and_its_json_has_what_it_promises(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    AcceleratorState._reset_state()  # a benchmark has a process of its own, and a precision that it may choose
    monkeypatch.chdir(tmp_path)  # no shards of quickstart here
    if name != "record":  # which takes its runs one after the other
        monkeypatch.setattr(f"shardstep.launch.benchmarks.bench_{name}.in_turn", once)  # warming up is tested below
    assert bench.main([name, "--repeats", "1", "--json", str(tmp_path / "found.json"), *TINY[name]]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["command"] == f"bench {name}"
    assert found["hardware"].keys() == {"cpu", "vectors", "bf16_units", "cores", "threads", "memory_gb", "gpus"}
    assert {"python", "torch", "accelerate", "torchvision", "webdataset", "shardstep"} <= found["versions"].keys()
    rows = {row["name"]: row for table in found["tables"] for row in table["rows"]}
    assert not set(ROWS[name]) - rows.keys()
    assert all(row["median"] > 0 and row["ratio"] > 0 and len(row["values"]) == 1 for row in rows.values())
    printed = capsys.readouterr()
    assert all(row in printed.out for row in rows)
    assert ("a script, seed 0: " in printed.err) == (name == "record")  # printed as soon as it is known
    if name == "record":
        notes = [note for table in found["tables"] for note in table["notes"]]
        assert "a script: the method of speedrun94, 2 steps of 50 images, cpu" in notes
        assert any(note.startswith("smoke: cpu, ") and "auto" not in note for note in notes)
    left_out = [note for table in found["tables"] for note in table["notes"] if "not installed" in note]
    libraries = {"loader": ["streaming", "litdata"], "step": ["lightning"], "startup": ["lightning"]}.get(name, [])
    assert len(left_out) == sum(not importable(library) for library in libraries)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(photographs, "in_turn", once)
    found = tmp_path / "found.json"
    assert bench.main(["loader", "--images", "photos", "--jpegs", "4", "--repeats", "1", "--json", str(found)]) == 0
    training, evaluation, *_ = json.loads(found.read_text())["tables"]
    assert training["title"].startswith("RandomResizedCrop(224) and flip of 4 JPEGs of 500x375")
    assert evaluation["title"].startswith("Resize(256) and CenterCrop(224) of 4 JPEGs of 500x375")
    for table in (training, evaluation):
        assert [row["name"] for row in table["rows"]] == [
            "OpenCV: the whole picture, cropped, linear",
            "shardstep: the whole picture, antialiased",
            "shardstep: only the crop, antialiased",
            "shardstep: only the crop, antialiased; index, pread, crc32",
            "torchvision ImageFolder + DataLoader",
            "webdataset, torchvision transforms, DataLoader",
        ]
        means = [float(note.split("Pillow's by ")[1].split()[0]) for note in table["notes"]]
        assert max(means[1:]) <= 1.0  # ours
    assert "pixels differ from Pillow's by" in capsys.readouterr().out


def once(works: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    return {name: [work() for _ in range(repeats)] for name, work in works.items()}


def test_the_bare_loop_has_a_process_of_its_own() -> None:
    torch.manual_seed(5)
    assert _in_own_process("bare_loop", 4, 1, "fp32") > 0
    assert torch.initial_seed() == 5  # that loop seeds its own process with 0


def test_the_script_keeps_to_its_method_where_there_are_images_enough() -> None:
    assert script_plan(50_000, 512, run_steps=980) == (2000, 200)  # 8 epochs of 25 whole batches
    assert script_plan(2999, 512, run_steps=980) == (2000, 8)
    assert script_plan(1999, 50, run_steps=2) == (50, 2)
    assert script_plan(1999, "full", run_steps=2) == (1999, 2)


def test_rates_of_the_script_are_those_of_the_recipe() -> None:
    model = whitening_cnn((3, 32, 32), 10, widths=(4, 4))
    assert isinstance(model, WhiteningCnn)
    optimizers = record_script._optimizers(model, 2000, bias_steps=75)
    first, *others = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert [id(value) for value in first["params"]] == [id(model.whitening.bias)]
    plan = Plan(2000, 50_000, 1, 1, Duration.parse("8 epochs"))
    schedule = {"name": "linear", "final": 0.0, "warmup": None, "warmup_start": 0.0}
    recipe = LearningRate(schedule, plan.duration, plan.samples_per_epoch, plan.global_batch_size)
    progress = Progress()
    for step in range(200):
        record_script._set_lrs(optimizers, step, 200)
        assert first["lr"] == pytest.approx(0.053 * recipe.factor(progress, "3 epochs"))
        assert [group["lr"] for group in others] == pytest.approx(
            [rate * recipe.factor(progress) for rate in (0.053, 0.67, 0.24)]
        )
        progress = plan.advance(progress, 2000)
    assert first["lr"] == 0


def test_every_benchmark_is_tested_here() -> None:
    assert {"loader", "step", "checkpoint", "startup", "record"} <= TINY.keys()
    assert not TINY.keys() - bench.BENCHMARKS.keys()


def test_json_alone_is_on_stdout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("a thing", "s", {"one": [1.0]}, "one")
    monkeypatch.setitem(sys.modules, "shardstep.launch.benchmarks.bench_step", _benchmark([table]))
    assert bench.main(["step", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["tables"][0]["title"] == "a thing"
    assert "a thing" in captured.err


def test_tables_that_were_done_before_an_interruption_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Iterator[Table]:
        yield Table("a thing", "s", {"one": [1.0]}, "one")
        assert "a thing" in capsys.readouterr().out  # before the next is measured
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "shardstep.launch.benchmarks.bench_step", _benchmark(interrupted()))
    with pytest.raises(KeyboardInterrupt):
        bench.main(["step", "--json", str(tmp_path / "found.json")])
    assert [table["title"] for table in json.loads((tmp_path / "found.json").read_text())["tables"]] == ["a thing"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--repeats", "0"], "0 is not a whole number from 1"),
        (["loader", "--images", "nowhere"], "no shards in nowhere"),
        (["step", "--json", "nowhere/found.json"], "--json=nowhere/found.json: there is no folder"),
        (["scaling", "--predict-only", "--gpus", "8,²"], "--gpus 8,² must be whole numbers"),
        (["startup", "data.trian=x"], "data.trian"),
        (["startup", "optimizer.name=sdg"], "sdg"),
        (["record", "smoke", "--runs", "1", "data.trian=x"], "data.trian"),
        (["record", "data.trian=x"], "data.trian"),
        (["record", "smoke", "--runns", "1"], "unrecognized arguments: --runns 1"),
        (["record", "smoke", "--script", "data.resize=24"], "--script is for 32x32 colour images"),
        (["record", "smoke", "--script", "data.validation=0.1"], "leave out data.validation"),
        (["record", "smoke", "--script", "data.fold=1/3", "data.test=none"], "leave out data.fold, data.test=none"),
        (["record", "smoke", "--script", "data.mix=[{dir: x, weight: 1}, {dir: y, weight: 2}]"], "leave out data.mix"),
    ],
)
def test_bad_input_is_one_clear_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = run(bench.main, arguments)
    except SystemExit as ending:  # of argparse
        code = int(ending.code or 0)
    assert code == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_works_are_warmed_up_once_and_then_measured_in_turn() -> None:
    calls: list[str] = []

    def work(name: str) -> Any:
        def measured() -> float:
            calls.append(name)
            return float(len(calls))

        return measured

    values = in_turn({"a": work("a"), "b": work("b")}, 2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert values == {"a": [3, 5], "b": [4, 6]}


@pytest.mark.parametrize(
    ("seconds", "printed"),
    [(3, ["warm-up repeat: 3 s", "repeat 1 of 2: 3 s", "repeat 2 of 2: 3 s"]), (2, [])],
)
def test_long_repeats_are_printed(
    seconds: int, printed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(bench_tables, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    in_turn({"a": lambda: 1.0}, 2)
    assert capsys.readouterr().err.splitlines() == printed


def test_ratios_are_of_pairs() -> None:
    # pairs 20/10, 30/20 and 80/40: 2, 1.5 and 2, whose median is 2, whereas the medians' ratio is 30/20 = 1.5
    table = Table("", "images/s", {"plain": [10, 20, 40], "ours": [20, 30, 80]}, "plain")
    assert paired_ratios(table, "ours") == [2, 1.5, 2]
    row = as_json(table)["rows"][1]
    assert (row["median"], row["lowest"], row["highest"]) == (30, 20, 80)
    assert (row["ratio"], row["ratio_lowest"], row["ratio_highest"]) == (2, 1.5, 2)
    # of 20, 30 and 80: deviations from 43.3 are 23.3, 13.3 and 36.7, so that s = sqrt(2066.7 / 2)
    assert (row["mean"], row["standard_error"]) == pytest.approx((130 / 3, (2066.67 / 2 / 3) ** 0.5), rel=1e-4)
    print_table(table, sys.stdout)


@pytest.mark.parametrize("columns", [80, 130])
def test_a_table_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", str(columns))
    rows = {"a name of sixty characters, such as libraries with a loader": [1.0, 2.0], "plain": [123456.0, 234567.0]}
    print_table(Table("a title " * 20, "images/s", rows, "plain", ["a note " * 20]), terminal := Terminal())
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    named = next(line for line in lines if line.startswith("  a name"))
    assert (" to 2.00" in named) == (columns == 130)


def _benchmark(tables: Iterable[Table]) -> ModuleType:
    module = ModuleType("shardstep.launch.benchmarks.bench_step")
    module.__dict__.update(add_options=lambda parser: None, measure=lambda given, folder: tables)
    return module
