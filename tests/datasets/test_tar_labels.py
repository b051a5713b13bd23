"""Tars that others wrote, with labels in any field: numbers or names, as text or in JSON."""

import gzip
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardstep.configs.errors import InputError
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.tar_labels import parse_label_field
from shardstep.datasets.verify import verify_shards
from shardstep.launch.cli import run as run_command
from shardstep.launch.shards import main as shards_main
from tests.datasets.test_sources import png
from tests.datasets.test_tar import write_tar


def write_samples(folder: Path, labels: list[bytes], extension: str, image: str = "png") -> Path:
    """Write tars of two samples each; the pixels of a sample have its number."""
    folder.mkdir()
    for first in range(0, len(labels), 2):
        members = {}
        for number, label in list(enumerate(labels))[first : first + 2]:
            members |= {f"{number:05d}.{image}": png(number), f"{number:05d}.{extension}": label}
        write_tar(folder / f"{first:06d}.tar", members)
    return folder


def classes_of_samples(folder: Path) -> list[str]:
    """The class of each sample, in the order of their numbers, which their pixels tell."""
    opened = open_shards(folder)
    pixels, labels = StreamReader(opened).read(np.arange(opened.manifest.samples))
    order = pixels[:, 0, 0, 0].argsort()
    return [opened.manifest.classes[label] for label in labels[order].tolist()]


@pytest.mark.parametrize(
    ("field", "labels", "classes", "expected"),
    [
        ("cls", [b"cat", b"dog\n", b"cat"], ["cat", "dog"], ["cat", "dog", "cat"]),
        ("cls", [b"1", b"0", b" 2\n"], ["0", "1", "2"], ["1", "0", "2"]),
        ("txt", [b"golden retriever", "\u00e9t\u00e9".encode(), b"cat"], None, None),
        ("txt", [b"10", b"9", b"1"], ["1", "9", "10"], ["10", "9", "1"]),  # more than there are samples: names
        ("txt", [b"10", b"9", b"x"], ["10", "9", "x"], ["10", "9", "x"]),
        ("index", [b"2", b"0", b"1"], ["0", "1", "2"], ["2", "0", "1"]),
        ("TXT", [b"b", b"a"], ["a", "b"], ["b", "a"]),
        (".txt", [b"b", b"a"], ["a", "b"], ["b", "a"]),
        ("coarse.cls", [b"b", b"a"], ["a", "b"], ["b", "a"]),
        ("json:label", [{"label": "b"}, {"label": "a", "caption": "x"}], ["a", "b"], ["b", "a"]),
        ("json:label", [{"label": 1}, {"label": 0}], ["0", "1"], ["1", "0"]),
        ("json:label", [{"label": 1.0}, {"label": "0"}], ["0", "1"], ["1", "0"]),
        (
            "json:meta.class.name",
            [{"meta": {"class": {"name": "b"}}}, {"meta": {"class.name": "a"}}],
            ["a", "b"],
            ["b", "a"],
        ),
        ("json:labels.0", [{"labels": ["b", "x"]}, {"labels": ["a"]}], ["a", "b"], ["b", "a"]),
    ],
)
def test_labels_in_any_field(
    tmp_path: Path, field: str, labels: list[Any], classes: list[str] | None, expected: list[str] | None
) -> None:
    contents = [label if isinstance(label, bytes) else json.dumps(label).encode() for label in labels]
    folder = write_samples(tmp_path / "x", contents, field.partition(":")[0].lstrip("."))
    assert shards_main(["index", str(folder), "--label", field]) == 0
    assert open_shards(folder).manifest.classes == (classes or ["cat", "golden retriever", "\u00e9t\u00e9"])
    assert classes_of_samples(folder) == (expected or ["golden retriever", "\u00e9t\u00e9", "cat"])
    assert verify_shards(folder) == []
    again = open_shards(folder).manifest
    assert shards_main(["index", str(folder), "--force"]) == 0  # with the field and the classes of before
    assert open_shards(folder).manifest == again


@pytest.mark.parametrize(
    ("field", "label", "message"),
    [
        ("txt", b"", "a.tar: 1.txt has an empty label"),
        ("txt", b"a photo of\na cat", "a.tar: 1.txt is not a label: 16 characters of text"),
        ("txt", b"a" * 300, "1.txt is not a label: 300 characters of text, aaa"),
        ("txt", b"\xff\xfe", "1.txt is not a label: it is not UTF-8"),
        ("txt", b"0.25", "label txt: labels such as 0.25 are measurements, not classes"),
        ("json:label", b"{", "1.json is not JSON"),
        ("json:label", b'{"class": 1, "url": 2}', "1.json has no label, only class, url"),
        ("json:a.b", b'{"a": {"c": 1}}', "1.json has no b, only c"),
        ("json:label", b'{"label": null}', "1.json has an empty label"),
        ("json:label", b'{"label": [["cat"], ["dog", "cow"]]}', "is not one label"),
        ("json:label", b'{"label": {"width": 500}}', "width has 500: the share of a label is a number from 0 to 1"),
        ("json:label.7", b'{"label": ["cat", "dog"]}', "1.json has no 7"),
        ("json:label", b'{"label": -1}', "label -1 is out of range: labels are integers from 0"),
        ("cls", None, "1.png has no label 1.cls"),
    ],
)
def test_fields_without_a_label(tmp_path: Path, field: str, label: bytes | None, message: str) -> None:
    name = f"1.{field.partition(':')[0]}"
    (tmp_path / "x").mkdir()
    write_tar(tmp_path / "x" / "a.tar", {"1.png": png(1)} | ({} if label is None else {name: label}))
    with pytest.raises(InputError, match=message):
        shards_main(["index", str(tmp_path / "x"), "--label", field])


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("options", "labels", "expected"),
    [
        ([], [BOM + b"1", b"0\r\n", b" 1 "], ["1", "0", "1"]),
        (["--label", "cls"], [BOM + b"cat", b"cat", b"dog"], ["cat", "cat", "dog"]),
        (["--label", "cls"], [b"4000000000", b"0", b"4000000000"], ["4000000000", "0", "4000000000"]),
        (["--classes", " a , b\t"], [b"1", b"0", b"1"], ["b", "a", "b"]),
        (["--classes", "a"], [b"0", b"0", b"0"], ["a", "a", "a"]),
    ],
)
def test_labels_as_programs_write_them(
    tmp_path: Path, options: list[str], labels: list[bytes], expected: list[str]
) -> None:
    folder = write_samples(tmp_path / "x", labels, "cls")
    assert shards_main(["index", str(folder), *options]) == 0
    assert classes_of_samples(folder) == expected
    assert verify_shards(folder) == []


@pytest.mark.parametrize(
    ("options", "label", "message"),
    [
        ([], b"cat", "1.cls is not a label (cat): it must be an integer from 0; to read names, add --label cls"),
        ([], b"1.5", "1.cls is not a label (1.5): it must be"),
        ([], b"+1", "1.cls is not a label (+1): it must be"),
        ([], "\u0661".encode(), "1.cls is not a label (\u0661): it must be"),
        ([], b"\x1b[31m", "1.cls is not a label (\\x1b[31m): it must be"),
        ([], b"a\nb", "1.cls is not a label (a\\nb): it must be"),
        ([], b"9" * 19, "1.cls is not a label (9999999999999999999): it must be"),
        ([], b"", "1.cls has an empty label"),
        ([], "1".encode("utf-16"), "1.cls is not a label: it is not UTF-8"),
        ([], b"4000000000", "the largest label is 4000000000, which would mean 4,000,000,001 classes for 1 sample"),
        ([], b"4000000000", "add `--label cls` to make a class of each label that occurs"),
        (["--classes", "a"], b"4000000000", "label 4000000000 is out of range: there is 1 class"),
        (["--classes", "a,b"], b"2", "label 2 is out of range: there are 2 classes"),
        (["--label", "cls", "--classes", "a"], b"b", "labels that are none of the 1 class: b"),
        (["--first-label", "2"], b"1", "1.cls is not a label (1): it must be an integer from 2; give another --first"),
        (["--classes", b"\xff".decode(errors="surrogateescape")], b"0", "the class name \\udcff is not UTF-8: give"),
    ],
)
def test_what_is_no_label_is_shown_with_a_remedy(
    tmp_path: Path, options: list[str], label: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    write_tar(tmp_path / "x" / "a.tar", {"1.png": png(1), "1.cls": label})
    assert run_command(shards_main, ["index", str(tmp_path / "x"), *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["._a.tar", ".b.tar"], "2 hidden files (._a.tar, ...)"),
        (["a.zip", "a.tar.part"], "1 .zip file (a.zip)"),
        (["train/a.tar"], "1 folder (train)"),
    ],
)
def test_a_folder_without_tars_says_what_it_has(
    tmp_path: Path, names: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / "x" / name, {"1.png": png(1), "1.cls": b"0"})
    assert run_command(shards_main, ["index", str(tmp_path / "x")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: no .tar files in {tmp_path / 'x'}; left out of {tmp_path / 'x'}: ")
    assert expected in told
    with pytest.raises(InputError, match=re.escape(expected)):
        open_shards(tmp_path / "x")


def test_names_in_a_tar_stay_on_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    write_tar(tmp_path / "x" / "a.tar", {"a\nb.png": png(1), "a\nb.cls": b"c\x1bd", "z\x07.png": png(2)})
    assert run_command(shards_main, ["index", str(tmp_path / "x")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == [
        "  - a.tar: z\\x07.png has no label z\\x07.cls",
        "  - a.tar: a\\nb.cls is not a label (c\\x1bd): it must be an integer from 0; to read names, add --label cls",
    ]
    write_tar(tmp_path / "x" / "a.tar", {"a\nb.png": png(1), "a\nb.cls": b"0"})
    assert run_command(shards_main, ["index", str(tmp_path / "x")]) == 0
    capsys.readouterr()
    assert run_command(shards_main, ["order", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out == "0 a\\nb\n"


@pytest.mark.parametrize("field", ["", "png", "json", "txt:label", ":label", "a/b", "JPG"])
def test_fields_that_cannot_be(tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(shards_main, ["index", str(write_samples(tmp_path / "x", [b"0"], "cls")), "--label", field]) == 2
    assert f"--label {field}: give" in capsys.readouterr().err


def test_names_with_given_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_samples(tmp_path / "x", [b"cat", b"dog"], "txt")
    assert run_command(shards_main, ["index", str(folder), "--label", "txt", "--classes", "dog,cow"]) == 2
    assert "labels that are none of the 2 classes: cat" in capsys.readouterr().err
    assert shards_main(["index", str(folder), "--label", "txt", "--classes", "dog,cow,cat"]) == 0
    assert open_shards(folder).manifest.samples_per_class == [1, 0, 1]
    assert classes_of_samples(folder) == ["cat", "dog"]


def test_a_damaged_name_is_found(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "x", [b"cat", b"dog"], "txt")
    shards_main(["index", str(folder), "--label", "txt"])
    tar = folder / "000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"cat" + bytes(509), b"dog" + bytes(509)))
    assert [line for line in verify_shards(folder) if "the label of" in line] == [
        "000000.tar: the label of sample 00000 (byte 1536) is damaged"
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("sample", "field"),
    [
        ({"cls": 1}, None),
        ({"cls": 1, "json": {"label": "cat"}, "txt": "a photo"}, "json:label"),
        ({"txt": "cat"}, "txt"),
        ({"index": 0}, "index"),
    ],
)
def test_what_webdataset_writes(tmp_path: Path, sample: dict[str, Any], field: str | None) -> None:
    import gc

    from webdataset import ShardWriter

    (tmp_path / "x").mkdir()
    pixels = [np.full((4, 3, 3), number, np.uint8) for number in range(3)]
    with ShardWriter(str(tmp_path / "x" / "%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(3):
            writer.write({"__key__": f"some/folder/v1.{number}", "png": pixels[number], **sample})
    gc.collect()
    assert (
        shards_main(["index", str(tmp_path / "x"), *(["--label", field] if field else ["--classes", "dog,cat"])]) == 0
    )
    assert open_shards(tmp_path / "x").key(1) == "some/folder/v1.1"
    assert set(classes_of_samples(tmp_path / "x")) == ({"0"} if field == "index" else {"cat"})


@pytest.mark.parametrize("content", ["images without labels", "labels without images", "nothing", "gzip", "damage"])
def test_other_labels_are_suggested_where_images_have_none(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x" / "0.tar"
    path.parent.mkdir()
    members = {"images without labels": {"1.png": png(1)}, "labels without images": {"1.cls": b"0"}, "nothing": {}}
    write_tar(path, members.get(content, {"1.png": png(1), "1.cls": b"0"}))
    if content == "gzip":
        path.write_bytes(gzip.compress(path.read_bytes()))
    if content == "damage":
        path.write_bytes(path.read_bytes() + b"after the end")
    assert run_command(shards_main, ["index", str(path.parent)]) == 2
    assert ("--label chooses" in capsys.readouterr().err) == (content == "images without labels")


def test_what_img2dataset_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Tars 00000.tar with <key>.jpg, <key>.json and <key>.txt (the caption), beside <shard>.parquet and <shard>_stats.json.
    (tmp_path / "x").mkdir()
    members: dict[str, bytes] = {}
    for number, label in enumerate(["cat", "dog", "cat"]):
        key = f"{number:09d}"
        about = {"url": f"https://x/{number}.jpg", "key": key, "status": "success", "error_message": None, "label": label,
                 "width": 4, "height": 3, "original_width": 4, "original_height": 3, "exif": "{}"}  # fmt: skip
        members |= {f"{key}.jpg": png(number), f"{key}.json": json.dumps(about, indent=4).encode()}
        members |= {f"{key}.txt": f"a photo of\na {label}".encode()}
    write_tar(tmp_path / "x" / "00000.tar", members)
    (tmp_path / "x" / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "x" / "00000_stats.json").write_text("{}")
    assert run_command(shards_main, ["index", str(tmp_path / "x")]) == 2
    assert "--label chooses other files, as txt or json:label" in capsys.readouterr().err
    assert shards_main(["index", str(tmp_path / "x"), "--label", "json:label"]) == 0
    assert classes_of_samples(tmp_path / "x") == ["cat", "dog", "cat"]
    line = (
        "3 .txt files (00000.tar: 000000000.txt, ...), 1 .parquet file (00000.parquet), 1 .json file (00000_stats.json)"
    )
    assert line in capsys.readouterr().err


def test_names_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    write_tar(
        tmp_path / "x" / "A.TAR",
        {"DIR/1.0.PNG": png(0), "DIR/1.0.TXT": b"Cat", "DIR/2.0.JPG": png(1), "DIR/2.0.TXT": b"b"},
    )
    assert shards_main(["index", str(tmp_path / "x"), "--label", "txt"]) == 0
    assert classes_of_samples(tmp_path / "x") == ["Cat", "b"]


@pytest.mark.parametrize(
    ("mode", "name", "command"),
    [
        ("w:gz", "a.tar.gz", "gunzip {}"),
        ("w:gz", "a.tgz", "gunzip {}"),
        ("w:bz2", "a.tar.bz2", "bunzip2 {}"),
        ("w:xz", "a.tar.xz", "unxz {}"),
        ("w:gz", "a.tar", "mv {} {}.gz && gunzip {}.gz"),
    ],
)
def test_compressed_tars_are_refused_with_the_command_that_unpacks_them(
    tmp_path: Path, mode: str, name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_samples(tmp_path / "x", [b"0", b"1"], "cls")
    with tarfile.open(folder / name, mode) as tar:  # type: ignore[call-overload]
        for member, data in (("9.png", png(1)), ("9.cls", b"0")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert run_command(shards_main, ["index", str(folder)]) == 2
    command = command.replace("{}", str(folder / name))
    assert f"is compressed: unpack it with `{command}`" in capsys.readouterr().err
    if shutil.which(command.replace("&&", "").split()[0]):
        subprocess.run(command, shell=True, check=True)
        assert shards_main(["index", str(folder)]) == 0
        assert open_shards(folder).manifest.samples == 3


def test_a_field_of_a_label_is_printed_as_it_is_parsed() -> None:
    assert [str(parse_label_field(text)) for text in ("cls", ".TXT", "json:a.b")] == ["cls", "txt", "json:a.b"]
