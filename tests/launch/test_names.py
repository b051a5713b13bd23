"""Text stays text: whatever classes and runs are called, commands work, and show the names as they are."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from shardstep.configs.errors import InputError
from shardstep.datasets.class_names import parse_class_names
from shardstep.datasets.manifest import open_shards
from shardstep.launch.cli import run as run_command
from shardstep.launch.export import main as export
from shardstep.launch.predict import main as predict
from shardstep.launch.report import main as report
from shardstep.launch.shards import main as shards_main
from shardstep.trainer.monitoring import pictures
from tests.datasets.test_sources import png
from tests.distributed import run_ranks
from tests.runs import failure_of, write_recipe

NAMES = [
    "$a$", "$\\frac{$", "costs $5, or $6", "\\$", "_hidden", "{}", "{0}%s%", "back\\slash", "a, b", 'say "hi"', "it's",
    " leading", "trailing ", "tab\there", "line\nbreak", "\x1b[31mred", "bell\a", "<b>&amp;", "<script>", "[bold]", ":cat:",
    "1", "010", "nan", "null", "true", "~", "-x", "@home", "#1", "`id`", "$(id)", "*", "caf\u00e9", "\u732b", "\U0001f408",
    "\u05d7\u05ea\u05d5\u05dc", "\u202egnp.exe", "x" * 200,
]  # fmt: skip


def make_images(folder: Path, names: list[str], split: str) -> None:
    """Two images a class, in class folders; those of train and test differ."""
    for place, name in enumerate(names):
        (folder / split / name).mkdir(parents=True)
        for number in range(2):
            path = folder / split / name / f"{number}.png"
            path.write_bytes(png((40 * place + number + (2 if split == "test" else 0)) % 256, size=(8, 8)))


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, shards of them in train/ and test/, and a finished run with both trackers."""
    folder = tmp_path_factory.mktemp("named")
    for split in ("train", "test"):
        make_images(folder / "images", NAMES, split)
        assert (
            shards_main(["write", "--source", f"{folder / 'images'}", "--split", split, "--out", f"{folder / split}"])
            == 0
        )
    recipe = write_recipe(
        folder, folder, run={"name": "a run, caf\u00e9 $5"}, train={"duration": "1 steps"},
        log={"tensorboard": True, "wandb": "offline", "wandb_artifacts": "weights"},
    )  # fmt: skip
    ((code, out, err),) = run_ranks(1, failure_of, str(recipe), pictures=True)
    assert (code, "warning" in err) == (0, False), err
    (folder / "out.txt").write_text(out)
    return folder


def test_a_run_finishes_with_all_its_pictures(named: Path) -> None:
    assert json.loads((named / "run" / "summary.json").read_text())["status"] == "finished"
    assert {path.stem for path in (named / "run").glob("*.png")} == {"curves", "confusion", "predictions"}
    assert "\x1b" not in (named / "out.txt").read_text()
    assert list((named / "run" / "wandb").glob("offline-run-*"))


def test_commands_on_that_run(named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(named / "run"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;&amp;amp;" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e]", page)
    capsys.readouterr()
    grid = ["--top", "39", "--grid", str(tmp_path / "grid.png")]
    assert predict([str(named / "run"), str(named / "images" / "test"), *grid]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
    assert predict([str(named / "run"), str(named / "images" / "test" / "nan"), "--json", "--top", "39"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert sorted(found["class"] for found in line["top"]) == sorted(NAMES)
    assert export([str(named / "run"), "--format", "safetensors", "--out", str(tmp_path / "a.safetensors")]) == 0
    capsys.readouterr()
    assert shards_main(["info", str(named / "train")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7 + len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_shows_a_name_as_text(name: str, tmp_path: Path) -> None:
    """As SVG, whose text can be read, where the name is not shortened."""
    import matplotlib

    image = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        pictures.draw_confusion(torch.eye(2, dtype=torch.int64), [name, "other"], tmp_path / "a.svg")
        pictures.draw_predictions(torch.from_numpy(image), [0], [1], [0.5], ["other", name], tmp_path / "b.svg")
    if len(name) < 24 and name.isprintable():
        from html import unescape

        for picture in ("a.svg", "b.svg"):
            shown = re.sub("<!--.*?-->", "", (tmp_path / picture).read_text(), flags=re.DOTALL)  # they quote formulas
            assert name.strip() in unescape(shown)


@pytest.mark.parametrize("file", ["index", "index is damaged", "manifest.json"])
def test_the_recommended_command_keeps_the_names(named: Path, tmp_path: Path, file: str) -> None:
    """Run as it is printed, by a shell; a folder of tars without a manifest has no names to keep."""
    folder = Path(shutil.copytree(named / "train", tmp_path / "my $HOME's tars"))
    name, _, damaged = file.partition(" is ")
    if damaged:
        (folder / name).write_bytes(b"?")
    else:
        (folder / name).unlink()
    with pytest.raises(InputError) as raised:
        open_shards(folder)
    command = re.search(r"`(shardstep shards index .*)`", str(raised.value))
    assert command
    bin_folder = Path(sys.executable).parent
    run = subprocess.run(f"PATH={bin_folder}:$PATH {command[1]}", shell=True, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lost = name == "manifest.json"
    assert open_shards(folder).manifest.classes == (
        [str(label) for label in range(len(NAMES))] if lost else sorted(NAMES)
    )


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("cat,dog", ["cat", "dog"]),
        ("cat, dog", ["cat", "dog"]),
        ("cat , dog ", ["cat", "dog"]),
        ("\tcat\t,  big dog  ", ["cat", "big dog"]),
        ("cat \r\ndog\r\n", ["cat", "dog"]),
        (' "cat" , "dog" ', ["cat", "dog"]),
        ('"@at",dog', ["@at", "dog"]),
        ('"cat ",cat', ["cat ", "cat"]),
        ('"cat, big",dog', ["cat, big", "dog"]),
        ('cat, "dog, big"', ["cat", "dog, big"]),
        ('"say ""hi""",it\'s', ['say "hi"', "it's"]),
        ('5" disk', ['5" disk']),
        ('" a ", b', [" a ", "b"]),
        ("cat\ndog\n", ["cat", "dog"]),
        ('"a\nb",c', ["a\nb", "c"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("$a$,010,null", ["$a$", "010", "null"]),
    ],
)  # fmt: skip
def test_class_names_are_a_csv_line(option: str, names: list[str]) -> None:
    assert parse_class_names(option) == names


def test_class_names_from_a_file_are_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b'\xef\xbb\xbfcat, big\r\n"dog"\r\n trailing \r\n')
    assert parse_class_names(f"@{path}") == ["cat, big", '"dog"', " trailing "]


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("", "a name is empty"),
        ("a,,b", "a name is empty"),
        ("a,b,a", "occur twice: a"),
        ("caf\u00e9,cafe\u0301", "occur twice: caf\u00e9"),
        ('"a,b', "the quotes do not match"),
        ('"a"b,c', "the quotes do not match"),
        ("cat ,cat", "occur twice: cat"),
        ('"",b', "a name is empty"),
        (" ,b", "a name is empty"),
        ("a,", "a name is empty"),
        ("a\n\nb", "a name is empty"),
        ("a\x1b[31m,a\x1b[31m", "occur twice: a\\x1b[31m"),
        ("@at,dog", """If @at is the name of a class, put it in quotes: --classes '"@at",...'"""),
        ("@at", "--classes @at cannot be read: No such file or directory. If @at is the name of a class"),
        ("@a\0b", "cannot be read: embedded null"),
        (
            b"caf\xe9,b".decode(errors="surrogateescape"),
            "the class name caf\\udce9 is not UTF-8: give --classes in UTF-8",
        ),
        ("@nowhere.txt", "--classes @nowhere.txt cannot be read: No such file or directory"),
    ],
)
def test_class_names_that_cannot_be(option: str, problem: str, named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(shards_main, ["index", str(named / "train"), "--force", f"--classes={option}"]) == 2
    message = capsys.readouterr().err
    assert problem in message
    assert message.count("\n") == 1


# --- names that people mistake for each other ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["cat", "cat "],
            "classes whose names look alike: 'cat' and 'cat '; class names with blanks around them: 'cat '",
        ),
        (["Cat", "cat"], "classes whose names look alike: 'Cat' and 'cat'"),
        (["cat", "cat\u200b"], "classes whose names look alike: 'cat' and 'cat\\u200b'"),
        (["cat", "c\u00adat"], "'cat' and 'c\\xadat'"),
        (["cat", "\ufeffcat"], "'cat' and '\\ufeffcat'"),
        (["big cat", "big\u00a0cat"], "'big cat' and 'big\\xa0cat'"),
        (["big cat", "bigcat"], "'big cat' and 'bigcat'"),
        (["cat", "\uff43at"], "'cat' and '\uff43at'"),
        (["STRASSE", "stra\u00dfe"], "'STRASSE' and 'stra\u00dfe'"),
        ([" dog", "cat"], "class names with blanks around them: ' dog'"),
        (["cat", "cat\n"], "'cat' and 'cat\\n'"),
        (["cat", "dog", "caf\u00e9", "cafe"], None),
        (["a", "A", "b", "B"], None),  # letters
        (["1", "01", "\u732b", "\U0001f408"], None),
    ],
)
def test_doubtful_names_are_told_in_one_line(
    names: list[str], told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "images", names, "train")
    out = tmp_path / "out"
    assert shards_main(["write", "--source", str(tmp_path / "images"), "--out", str(out)]) == 0
    assert sorted(open_shards(out).manifest.classes) == sorted(names)
    written = [line for line in capsys.readouterr().err.splitlines() if "If that is a mistake" in line]
    assert shards_main(["index", str(out), "--force"]) == 0  # with the names of before
    indexed = [line for line in capsys.readouterr().err.splitlines() if "If that is a mistake" in line]
    assert written == indexed
    assert len(written) == (told is not None)
    assert told is None or told in written[0]


# --- one name in two Unicode forms ------------------------------------------------------------------------------------

NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("packed", [False, True])
def test_both_forms_of_a_name_are_one_class(packed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train as macOS writes it, test as others do, and one folder more that has both."""
    make_images(tmp_path / "images", [NFD, "a"], "train")
    make_images(tmp_path / "images", [NFC, "a"], "test")
    make_images(tmp_path / "two", [NFC, NFD], "train")
    sources = {"train": "images", "test": "images", "both": "two"}
    for out, source in sources.items():
        place = tmp_path / source
        if packed:
            place = tmp_path / f"{out}.tar"
            subprocess.run(["tar", "cf", place, "-C", tmp_path / source, "."], check=True)
        split = "test" if out == "test" else "train"
        assert shards_main(["write", "--source", str(place), "--split", split, "--out", str(tmp_path / out)]) == 0
        classes = open_shards(tmp_path / out).manifest.classes
        assert classes == ([NFC] if out == "both" else ["a", NFC])
        assert unicodedata.is_normalized("NFC", classes[-1])
        merged = "merged: folders whose names are one in another Unicode form (NFC and NFD): caf\u00e9"
        assert (merged in capsys.readouterr().err) == (out == "both")
    assert open_shards(tmp_path / "both").manifest.samples == 4
    recipe = write_recipe(tmp_path, tmp_path, train={"duration": "1 steps", "global_batch_size": 4})
    ((code, _, err),) = run_ranks(1, failure_of, str(recipe))
    assert code == 0, err


def test_a_manifest_of_an_earlier_version_has_its_names_in_form_nfc(tmp_path: Path) -> None:
    from dataclasses import replace

    from shardstep.datasets.manifest import manifest_bytes, parse_manifest

    make_images(tmp_path / "images", ["a", "b"], "train")
    shards_main(["write", "--source", str(tmp_path / "images"), "--out", str(tmp_path / "train")])
    now = open_shards(tmp_path / "train").manifest
    for names, expected in (([NFD, "b"], [NFC, "b"]), ([NFC, NFD], [NFC, NFD])):
        former = replace(now, classes=names)
        found = parse_manifest(manifest_bytes(former).decode(), "x")
        assert (found.classes, found.fingerprint) == (expected, former.computed_fingerprint())


def test_a_folder_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    make_images(tmp_path / "images", [b"caf\xe9".decode(errors="surrogateescape")], "train")
    arguments = ["write", "--source", str(tmp_path / "images"), "--out", str(tmp_path / "train")]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert run_command(shards_main, arguments) == 2
    assert told.getvalue() == "error: the class name caf\\udce9 is not UTF-8: rename its folder\n"
