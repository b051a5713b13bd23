"""Comparisons with real processes: interrupted and resumed, a variant that diverges, a search for learning rates."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardstep.configs.errors import InputError
from shardstep.launch import compare
from shardstep.launch.comparison.results import (
    Point,
    RunResult,
    Variant,
    optimizer_memory,
    read_result,
    tail_loss,
    worst_outcome,
)
from shardstep.launch.comparison.variants import SEARCH_SEED
from tests.distributed import HANG_S, run_command
from tests.launch.test_launch import BIN
from tests.runs import read_lines, write_recipe

SPARING: dict[str, Any] = {
    "eval": {"every": "200 steps"},
    "checkpoint": {"every": "100000 steps"},
    "log": {"every": "20 steps"},
}
VARIANTS = {
    "sgd": ["optimizer.name=sgd", "optimizer.lr=0.05"],
    "adam": ["optimizer.name=adam", "optimizer.lr=0.001"],
    "diverging": ["optimizer.name=sgd", "optimizer.lr=1e30"],
}


def command(folder: Path, shards: Path, *options: str) -> list[str]:
    (folder / "variants.yaml").write_text(yaml.safe_dump(VARIANTS, sort_keys=False))
    recipe = write_recipe(folder, shards, **SPARING)
    out = ["--variants", str(folder / "variants.yaml"), "--out", str(folder / "out")]
    return [str(BIN / "shardstep"), "compare", str(recipe), *out, *options]


def wait_for_steps(metrics: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + HANG_S
    while not (metrics.is_file() and metrics.stat().st_size > 200):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupted_comparison_is_resumed(shards: Path, tmp_path: Path) -> None:
    """Ctrl-C in the second of three runs: the first is kept, the second resumed, the third is a row though it diverges."""
    arguments, out = command(tmp_path, shards, "--seeds", "1", "--budget", "1200 steps"), tmp_path / "out"
    process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(out / "adam" / "0" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=HANG_S)
    assert process.returncode == 85, message
    assert "the same command resumes: shardstep compare" in message
    first, second = read_result(out / "sgd" / "0"), read_result(out / "adam" / "0")
    assert (first.outcome, second.outcome) == ("finished", "unfinished")
    assert second.state == "preempted"
    assert not (out / "diverging").exists()
    before = (out / "sgd" / "0" / "summary.json").stat().st_mtime_ns

    result = run_command(*arguments[1:], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (out / "sgd" / "0" / "summary.json").stat().st_mtime_ns == before
    assert "resuming from" in (out / "adam" / "0.log").read_text()
    steps = [line["step"] for line in read_lines(out / "adam" / "0" / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(20, 1201, 20))
    assert re.search(r"diverging 0: the (test )?loss is (nan|inf)", result.stdout)
    rows = {line.split()[0]: line.split()[1:3] for line in (out / "table.txt").read_text().splitlines() if line}
    assert rows["diverging"] == ["0", "failed"]
    assert rows["sgd"][0] == rows["adam"][0] == "1"

    found = json.loads((out / "results.json").read_text())
    assert [len(variant["runs"]["0"]["curve"]) for variant in found["variants"][:2]] == [6, 6]  # each 200 steps
    # Adam keeps two numbers of 4 bytes per parameter, SGD without momentum none
    assert found["variants"][1]["optimizer_state_bytes_per_parameter"] == pytest.approx(8, abs=0.01)
    assert found["variants"][0]["optimizer_state_bytes_per_parameter"] == 0
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"<script|<link|(?:src|href)=.http", page)  # namespaces aside, no address and no code
    assert "No difference can be called real" in page

    again = run_command(*arguments[1:], cwd=tmp_path)  # nothing is left to do
    assert again.returncode == 0, again.stderr
    assert "diverging 0:" not in again.stdout
    other = run_command(*arguments[1:], "--budget", "10 steps", cwd=tmp_path)
    assert other.returncode == 2
    assert "holds another comparison" in other.stderr
    assert "budget: 1200 steps -> 10 steps" in other.stderr


@pytest.mark.parametrize("test_set", ["test", None])
def test_folds_repeat_every_variant(test_set: str | None, shards: Path, tmp_path: Path) -> None:
    data = {} if test_set else {"test": "none"}
    train = {} if test_set else {"precision": "auto"}  # which is measured in a step beforehand
    recipe, out = write_recipe(tmp_path, shards, data=data, train=train), tmp_path / "out"
    arguments = ["compare", str(recipe), "--over", "data.fold=1/3,2/3,3/3", "--seeds", "1", "--budget", "6 steps"]
    result = run_command(*arguments, "--out", str(out), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summaries = [json.loads((out / "recipe" / run / "summary.json").read_text()) for run in ("0", "1", "2")]
    assert [found["data"]["validation_samples"] for found in summaries] == [34, 34, 33]  # of 101
    accuracies = [found["validation"]["accuracy"] for found in summaries]
    (variant,) = json.loads((out / "results.json").read_text())["variants"]
    assert variant["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 3)
    assert variant["accuracy"]["half_width"] is not None
    assert "on the fold that each run held out" in " ".join(result.stdout.split())
    sizes = "67 + 34 + 53 images" if test_set else "67 + 34 images"  # 101 training images, 53 of the test set
    assert sizes in (out / "report.html").read_text()
    other = run_command(*arguments[:2], "--over", "data.fold=1/3,2/3", "--out", str(out), "--seeds", "1", cwd=tmp_path)
    assert other.returncode == 2
    assert "folds: ['1/3', '2/3', '3/3'] -> ['1/3', '2/3']" in other.stderr


@pytest.mark.parametrize(
    ("folds", "message"),
    [("1/3,1/3", "give each fold once"), ("1/3,4/3", "data.fold=4/3 must be one of several parts")],
)
def test_what_are_no_folds(folds: str, message: str, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    result = run_command("compare", str(recipe), "--over", f"data.fold={folds}", cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr


def test_a_search_goes_by_the_validation_set(shards: Path, tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, shards, data={"validation": 0.3}), tmp_path / "out"
    search = ["--tune", "optimizer.lr", "--trials", "2", "--budget", "4 steps", "--seeds", "1"]
    result = run_command(
        "compare", str(recipe), "--over", "optimizer.name=sgd", *search, "--out", str(out), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    (variant,) = json.loads((out / "results.json").read_text())["variants"]
    best = min(variant["search"], key=lambda rate: variant["search"][rate]["validation_loss"])
    assert variant["rate"] == float(best)
    assert variant["accuracy"]["mean"] == variant["runs"]["0"]["accuracy"]
    summary = json.loads((out / "sgd" / "0" / "summary.json").read_text())
    assert variant["runs"]["0"]["accuracy"] == summary["eval"]["accuracy"]  # on the test set
    assert "lowest validation loss" in " ".join(result.stdout.split())


def finish(folder: Path, lr: float, loss: float) -> None:
    """Write as much of a finished run as a comparison reads, with a given training loss."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    line = {"kind": "eval", "step": 4, "epoch": 1.0, "samples": 101, "loss": 1.0, "accuracy": 0.5, "train_loss": loss}
    (folder / "metrics.jsonl").write_text(json.dumps(line | {"wall_s": 2.0, "train_s": 1.5, "lr": lr}) + "\n")
    summary = {"status": "finished", "wall_s": 2.0, "world_size": 1, "device": "cpu", "precision": "fp32"}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_the_search_goes_on_at_an_edge_and_fixes_its_learning_rate(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    options = ["--over", "optimizer.name=sgd", "--tune", "optimizer.lr", "--seeds", "2", "--out", str(tmp_path / "out")]
    given = compare._parser().parse_intermixed_args([str(recipe), *options])
    comparison = compare.prepare(given, "shardstep compare ...")
    base = 0.05 if comparison.base_rates["sgd"] is None else comparison.base_rates["sgd"]
    tasks = comparison.search_tasks()
    assert [task.name for task in tasks] == [f"sgd rate-{rate:g}" for rate in comparison.search("sgd")]
    assert len(tasks) == 3
    assert all(f"run.seed={SEARCH_SEED}" in task.arguments for task in tasks)
    # the highest of three rates is best: a fourth is tried, a fifth, and a sixth, but no more
    for loss, rate in zip((3.0, 2.0, 1.0), list(comparison.search("sgd")), strict=True):
        finish(comparison.folder / "sgd" / f"rate-{rate:g}", rate, loss)
    assert comparison.seed_tasks() == []  # they wait for the end of the search
    comparison.fix_rates()
    assert comparison.rates == {}
    for loss, times in ((0.5, 10), (0.4, 10**1.5), (0.3, 100)):
        (extra,) = comparison.search_tasks()
        rate = list(comparison.search("sgd"))[-1]
        assert rate == pytest.approx(times * base, rel=0.01)
        assert extra.name == f"sgd rate-{rate:g}"
        finish(comparison.folder / "sgd" / f"rate-{rate:g}", rate, loss)
    assert comparison.search_tasks() == []
    comparison.fix_rates()
    assert [task.name for task in comparison.seed_tasks()] == ["sgd 0", "sgd 1"]
    assert all(f"optimizer.lr={rate:g}" in task.arguments for task in comparison.seed_tasks())
    # whatever the search would say later: runs of a variant do not differ in their rate
    again = compare.prepare(given, "shardstep compare ...")
    (comparison.folder / "sgd" / f"rate-{rate:g}" / "summary.json").unlink()
    assert again.rate("sgd") == rate


def test_variants_that_a_command_leaves_out_stay_known(shards: Path, tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, shards))

    def prepared(*names: str, lr: float) -> compare.Comparison:
        variants = {name: [f"optimizer.name={name}", f"optimizer.lr={lr}"] for name in names}
        (tmp_path / "variants.yaml").write_text(yaml.safe_dump(variants))
        options = [recipe, "--variants", str(tmp_path / "variants.yaml"), "--out", str(tmp_path / "out")]
        found = compare.prepare(compare._parser().parse_intermixed_args(options), "shardstep compare ...")
        found.save()
        return found

    prepared("sgd", "adam", lr=0.3)
    prepared("sgd", "adam", lr=0.1)  # nothing has been run
    finish(tmp_path / "out" / "adam" / "0", 0.1, 1.0)
    prepared("sgd", lr=0.1)
    with pytest.raises(InputError, match="variant adam differs from its runs there"):
        prepared("adam", lr=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --over KEY=A,B"),
        (
            ["--over", "optimizer.lrr=1,2"],
            "^nothing was started: variant 1, 2: recipe .*optimizer.lrr is not an option",
        ),
        (["--over", "optimizer.name=sgd,adma"], "variant adma: .*optimizer.name=adma is unknown; did you mean adam"),
        (["--over", "optimizer.name=sgd", "--budget", "soon"], "write epochs, steps or a time"),
        (["--over", "optimizer.name=sgd", "--trials", "3"], "--trials has no effect without --tune"),
        (["--over", "optimizer.name=sgd", "--tune", "optimizer.nesterov"], "is not a number above 0"),
        (
            ["--over", "optimizer.name=sgd", "--seeds", "0", "--parallel", "0"],
            "2 problems\n.*--seeds 0.*\n.*--parallel 0",
        ),
        (["--over", "optimizer.name=sgd", "--target", "70"], "must be an accuracy between 0 and 1"),
        (["--over", "optimizer.name=sgd", "run.seed=3"], "sets its runs' folders and seeds"),
        (["--over", "run.seed=0,1"], "variant 0: run.seed: a comparison sets its runs' folders and seeds"),
        (["--over", "optimizer.lr=0.1,0.2", "--tune", "optimizer.lr"], "optimizer.lr: --tune searches it"),
        (["--over", "optimizer.name=sgd", "--tune", "train.global_batch_size"], "global_batch_size=.* of the search"),
        (["--over", "train.duration=1 epochs,2 epochs"], "variants differ in train.duration"),
        (["--over", "optimizer.name=sgd", "train.duration=3 steps", "--budget", "5 steps"], "--budget sets the length"),
        (["--over", "optimizer.name=sgd", "train.precision=auto", "--slurm", "--time 5"], "each job would measure it"),
        (["--over", "loss.name=mse"], "has no accuracy to compare|does not fit|reconstruct"),
        (["--over", "optimizer.name=sgd,adam,sgd"], "^nothing was started: variants 0-sgd, 2-sgd are the same"),
        (["--over", "optimizer.lr=0.1,0.10,0.2"], "^nothing was started: variants 0.1, 0.10 are the same: keep one of"),
        (
            ["--over", "optimizer.name=sgd", "--doc", "/nowhere/a.md"],
            "--doc=/nowhere/a.md: there is no folder /nowhere",
        ),
        (["--over", "optimizer.name=sgd", "schedule.name=cosine", "--budget", "5 s"], "spans train.duration"),
    ],
)
def test_bad_input(options: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    given = compare._parser().parse_intermixed_args([str(recipe), *options, "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match=message):
        compare.prepare(given, "")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    recipe = str(write_recipe(tmp_path, shards))
    given = compare._parser().parse_intermixed_args(
        [recipe, "--over", "optimizer.name=sgd", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(InputError, match="holds files that are not a comparison's"):
        compare.prepare(given, "")


def test_live_runs_are_waited_for(shards: Path, tmp_path: Path) -> None:
    """Runs of a killed comparison: they would be started a second time, and their search would end without them."""
    recipe = str(write_recipe(tmp_path, shards))
    options = [recipe, "--over", "optimizer.name=sgd", "--seeds", "1", "--out", str(tmp_path / "out")]
    compare.prepare(compare._parser().parse_intermixed_args(options), "").save()
    (tmp_path / "out" / "sgd" / "0").mkdir(parents=True)
    with (tmp_path / "out" / "sgd" / "0" / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run_command("compare", *options, cwd=tmp_path)
    assert result.returncode == 2
    assert "an earlier command left 1 run running" in result.stderr


def test_a_budget_of_time_resumes_with_the_same_share_of_the_machine(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(write_recipe(tmp_path, shards))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})

    def prepared(out: str, *options: str) -> compare.Comparison:
        given = [recipe, "--over", "optimizer.name=sgd", "--out", str(tmp_path / out), *options]
        return compare.prepare(compare._parser().parse_intermixed_args(given), "")

    prepared("out", "--budget", "3 s").save()
    prepared("out", "--budget", "3 s", "--parallel", "2").save()  # nothing has been run
    finish(tmp_path / "out" / "sgd" / "0", 0.1, 1.0)
    prepared("out", "--budget", "3 s", "--parallel", "2", "--seeds", "4").check_share()
    for options, share in [((), "2 threads"), (("--parallel", "3"), "2 cores together with 2 more")]:
        comparison = prepared("out", "--budget", "3 s", *options)
        comparison.save()  # does not forget what the runs there had
        with pytest.raises(
            InputError, match=f"a run of 3 s of training had 1 thread and would now have {share}: give the"
        ):
            comparison.check_share()
    with pytest.raises(InputError, match="had 1 thread and would now have a job of Slurm"):
        prepared("out", "--budget", "3 s", "--slurm", "--time 5").check_share()
    prepared("steps", "--budget", "3 steps").save()
    finish(tmp_path / "steps" / "sgd" / "0", 0.1, 1.0)
    prepared("steps", "--budget", "3 steps", "--parallel", "2").check_share()


def test_more_runs_need_the_same_share_and_the_report_does_not(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path, shards, **SPARING))
    out = tmp_path / "out"
    given = [recipe, "--over", "optimizer.name=sgd", "--out", str(out), "--budget", "0.2 s", "--doc", str(out / "a.md")]
    assert run_command("compare", *given, "--seeds", "1", cwd=tmp_path).returncode == 0
    (out / "a.md").unlink()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3, 4, 5, 6})
    assert compare.main([*given, "--seeds", "1"]) == 0
    assert (out / "a.md").is_file()
    with pytest.raises(InputError, match="would now have 7 threads"):
        compare.main([*given, "--seeds", "2"])
    assert not (out / "sgd" / "1").exists()


def test_auto_is_measured_once_for_all_runs(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, **SPARING)
    automatic = ["train.precision=auto", "train.memory_format=auto", "train.device=cpu"]
    options = [str(recipe), *automatic, "--over", "optimizer.name=sgd,adam", "--seeds", "1", "--budget", "2 steps"]
    assert run_command("compare", *options, "--out", str(tmp_path / "out"), cwd=tmp_path).returncode == 0
    chosen = json.loads((tmp_path / "out" / "comparison.json").read_text())["settled"]
    assert [text.partition("=")[0] for text in chosen] == [
        "train.precision",
        "train.memory_format",
        "train.convolutions",
    ]
    for name in ("sgd", "adam"):
        starts = json.loads((tmp_path / "out" / name / "0" / "starts.json").read_text())
        assert all(text in starts[0]["command"] for text in chosen)


def test_a_variant_with_another_precision_does_not_take_over_the_method(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, **SPARING)
    variants = tmp_path / "variants.yaml"
    variants.write_text("plain: [optimizer.lr=0.1]\nhalf: [train.precision=bf16]\n")
    options = [
        str(recipe),
        "train.precision=auto",
        "--variants",
        str(variants),
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    comparison = compare.prepare(compare._parser().parse_intermixed_args(options), "")
    comparison.auto_choices = [
        "train.precision=fp32",
        "train.memory_format=channels_last",
        "train.convolutions=winograd",
    ]
    arguments = {name: comparison._task(name, "0", []).arguments for name in ("plain", "half")}
    assert "train.convolutions=winograd" in arguments["plain"]
    assert not any("convolutions" in text for text in arguments["half"])


def test_a_method_measured_with_another_model_is_not_taken_over(shards: Path, tmp_path: Path) -> None:
    recipe, variants = write_recipe(tmp_path, shards, **SPARING), tmp_path / "variants.yaml"
    variants.write_text(
        "wide: ['model.hidden=[64]']\nplain: [optimizer.lr=0.1]\nwide_too: ['model.hidden=[64]', optimizer.lr=0.1]\n"
    )
    options = [str(recipe), "train.precision=auto", "--variants", str(variants), "--out", str(tmp_path / "out")]
    comparison = compare.prepare(compare._parser().parse_intermixed_args(options), "")
    assert comparison.probed == "wide"
    comparison.auto_choices = ["train.precision=bf16", "train.memory_format=channels_last", "train.convolutions=unfold"]
    taken = {
        name: "train.convolutions=unfold" in comparison._task(name, "0", []).arguments for name in comparison.variants
    }
    assert taken == {"wide": True, "plain": False, "wide_too": True}


def test_losing_the_terminal_asks_the_runs_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardstep.launch.comparison import pool

    script = tmp_path / "train.py"
    script.write_text(
        "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(85))\nprint('here', flush=True)\nsignal.pause()"
    )
    monkeypatch.setattr(pool, "TRAIN_SCRIPT", script)
    codes: list[int] = []

    def hang_up() -> None:
        while not (tmp_path / "log").is_file() or "here" not in (tmp_path / "log").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGHUP)

    thread = threading.Thread(target=hang_up)
    thread.start()
    tasks = [pool.Task("one", [], tmp_path / "log"), pool.Task("two", [], tmp_path / "log2")]
    assert pool.run_tasks(tasks, 1, [], lambda task, code, seconds: codes.append(code)) == "stopped"
    thread.join()
    assert codes == [85]


def test_sensitivity_to_the_learning_rate() -> None:
    from matplotlib import pyplot

    from shardstep.launch.comparison.comparison_plots import PLOTS
    from shardstep.launch.comparison.comparison_report import _sensitivity

    def variant(*losses: float | None) -> Variant:
        search = {float(rate): RunResult("", "finished", train_loss=loss) for rate, loss in enumerate(losses, start=1)}
        return Variant("a", [], None, {}, search)

    assert _sensitivity(variant(2.0, 1.0, 1.5)) == "+100%"
    assert _sensitivity(variant(2.0, 1.5, 1.0)) == "+50%; the best is at the edge"
    assert _sensitivity(variant(2.0, 1.0, 3e9)) == "explodes at the next value"
    figure = PLOTS["rates"]._draw(pyplot, [variant(2.0, 1.0, 3e9)], None, "optimizer.lr")
    assert figure.axes[0].get_ylim() == pytest.approx((0.95, 2.05))  # its line leaves the picture
    pyplot.close(figure)
    assert _sensitivity(variant(2.0, 1.0, None)) == "fails at the next value"
    assert _sensitivity(variant(0.0, 0.0, 1.0)) == ""  # all learnt: no share of nothing
    assert _sensitivity(variant(None)) == "all values failed"


def test_the_outcome_of_runs_without_accuracy() -> None:
    def variant(*states: Any) -> Variant:
        runs = {seed: RunResult("", state, has_diverged=state == "failed") for seed, state in enumerate(states)}
        return Variant("a", [], None, runs, {})

    assert worst_outcome(variant("finished", "failed", "missing")) == "failed"
    assert worst_outcome(variant("finished", "killed", "missing")) == "unfinished"
    assert worst_outcome(variant("missing", "missing")) == "missing"
    assert worst_outcome(variant("finished")) == "not evaluated"


def test_outcomes(tmp_path: Path) -> None:
    assert read_result(tmp_path / "nothing").state == read_result(tmp_path / "nothing").outcome == "missing"
    log = tmp_path / "0.log"
    log.write_text("error: no data\n")
    never_begun = read_result(tmp_path / "nothing", log)
    assert never_begun == RunResult(str(tmp_path / "nothing"), "missing", "error: no data")
    assert never_begun.outcome == never_begun.as_json()["state"] == "unfinished"
    finish(tmp_path / "run", 0.1, 2.0)
    finished = read_result(tmp_path / "run")
    assert (finished.state, finished.train_loss, finished.seconds_per_epoch) == ("finished", 2.0, 1.5)
    assert finished.reached(0.5) is not None
    assert finished.reached(0.51) is None
    (tmp_path / "run" / "summary.json").write_text('{"status": "preempted"}')
    assert (read_result(tmp_path / "run").state, read_result(tmp_path / "run").outcome) == ("preempted", "unfinished")
    (tmp_path / "run" / "summary.json").write_text('{"status": "failed"}')
    assert read_result(tmp_path / "run").outcome == "unfinished"  # a full disk, say: it can be resumed
    (tmp_path / "run" / "summary.json").write_text('{"status": "failed", "failure": "nonfinite", "reason": "diverged"}')
    assert (read_result(tmp_path / "run").outcome, read_result(tmp_path / "run").reason) == ("failed", "diverged")
    by_an_earlier_version = '{"status": "failed", "reason": "the loss of a step up to step 4 was NaN or infinite"}'
    (tmp_path / "run" / "summary.json").write_text(by_an_earlier_version)
    assert read_result(tmp_path / "run").outcome == "failed"
    (tmp_path / "run" / "summary.json").write_text('{"status": "failed"}')  # another one
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "epoch": 2, "samples": 131, "loss": null}\n{"kind": "tr')
    assert read_result(tmp_path / "run").outcome == "failed"
    (tmp_path / "run" / "summary.json").write_text('{"status": "failed", "failure": "memory"}')
    assert read_result(tmp_path / "run").outcome == "unfinished"


def test_the_final_training_loss_is_that_of_the_last_fifth() -> None:
    def point(samples: int, loss: float) -> Point:
        return Point(samples, 0.0, samples, 0.0, None, None, loss)

    curve = [point(100, 9.0), point(180, 5.0), point(190, 2.0), point(200, 1.0)]
    # a fifth of 200 is 40: intervals of 10 and 10 samples, and 20 of the 80 before: (10 x 1 + 10 x 2 + 20 x 5) / 40
    assert tail_loss(curve) == pytest.approx(3.25)
    assert tail_loss(curve[:1]) == 9
    assert tail_loss([]) is None


def test_memory_is_measured_from_the_checkpoint(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    place = tmp_path / "checkpoints" / "step-00000001"
    place.mkdir(parents=True)
    save_file({"w": torch.zeros(10, 2), "norm.running_mean": torch.zeros(50)}, place / "model.safetensors")
    torch.save({"state": {0: {"step": torch.tensor(1.0), "m": torch.zeros(10, 2)}}}, place / "optimizer.pt")
    assert optimizer_memory(tmp_path) == (4 + 80) / 20
    assert optimizer_memory(tmp_path / "none") is None
    (place / "optimizer.pt").write_bytes(b"damaged")
    assert optimizer_memory(tmp_path) is None


def test_a_table_fits_a_terminal() -> None:
    from shardstep.configs.text import table

    columns = ["variant", "n", "accuracy %", "s/epoch", "epochs", "s to 50 %", "steps", "B/param", "lr"]
    row = ["per_example", "3", "61.2 ±12.3", "0.0123", "123", "1234 (2/3)", "12345 (2/3)", "12.0", "0.00316"]
    assert all(len(line) <= 80 for line in table(columns, [row]))
    assert table(["a", "b"], [["xx", "1"], ["y", "22"]]) == ["a   b", "-----", "xx  1", "y  22"]


def test_lines_that_lack_a_place_are_passed_over(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "loss": 0.1, "wall_s": 1.0}\n')
    assert read_result(tmp_path / "run").curve == read_result(finished_run).curve


def test_seconds_have_three_digits() -> None:
    from shardstep.launch.comparison.comparison_report import _columns, _row

    def row(train_s: float) -> dict[str, str]:
        point = Point(step=5, epoch=1.0, samples=1, train_s=train_s, loss=0.0, accuracy=0.5, train_loss=0.0)
        variant = Variant("a", [], None, {0: RunResult("", "finished", curve=[point])}, {})
        return dict(zip(_columns(0.34, "", "accuracy"), _row(variant, 0.34), strict=True))

    for seconds, text in ((0.0812, "0.0812"), (12.34, "12.3"), (1234.4, "1234")):
        assert row(seconds)["s to 34 %"] == row(seconds)["s/epoch"] == text
    assert row(1.0)["steps"] == "5"


def test_runs_at_once_divide_the_cores_or_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardstep.launch.comparison import pool

    script = tmp_path / "train.py"
    script.write_text("import os, sys; print(sorted(os.sched_getaffinity(0)), os.environ.get('CUDA_VISIBLE_DEVICES'))")
    monkeypatch.setattr(pool, "TRAIN_SCRIPT", script)
    codes: list[int] = []
    tasks = [pool.Task(f"{number}", [], tmp_path / f"{number}.log") for number in range(3)]
    assert pool.run_tasks(tasks, 2, ["GPU-a", "GPU-b"], lambda task, code, seconds: codes.append(code)) == "done"
    assert codes == [0, 0, 0]
    printed = [task.log.read_text().split()[-1] for task in tasks]
    assert {printed[0], printed[1]} == {"GPU-a", "GPU-b"}
    assert pool.run_tasks(tasks, 1, [], lambda task, code, seconds: None, within_s=-1) == "out of time"
    given: list[list[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3, 4})
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: given.append(cores))
    assert pool.run_tasks(tasks[:2], 2, [], lambda task, code, seconds: None) == "done"
    assert given == [[0, 1], [2, 3]]
