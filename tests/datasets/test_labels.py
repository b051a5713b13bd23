"""Labels in a table: which row means which file, which columns, in which order, and what is counted or refused."""

import importlib.util
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
from shardstep.configs.schema import DataConfig
from shardstep.datasets.class_names import label_names, sorted_classes
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.sources import open_source, surely_differs
from shardstep.datasets.sources.file_names import files_of_names
from shardstep.datasets.sources.source import Source
from shardstep.datasets.sources.tables import LabelOptions, read_table
from shardstep.datasets.write import make_missing_shards
from shardstep.launch.cli import run as run_command
from shardstep.launch.shards import main as shards_main
from shardstep.trainer.data import make_missing_data, open_parts
from tests.datasets.test_sources import png

HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
NEEDS_PYARROW = pytest.mark.skipif(not HAS_PYARROW, reason="no pyarrow here: parquet files are not read")


def make_files(root: Path, names: list[str]) -> Path:
    """Write a PNG of its own at each path below a folder."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def labelled(source: Source) -> dict[str, str]:
    """Each image's name with its class."""
    return {source.name(number): source.classes[label] for number, label in enumerate(source.labels.tolist())}


def open_with(folder: Path, table: str, split: str = "train", **columns: str) -> Source:
    """Open photos/ with a table of this content, of the kind that it looks like."""
    kind = "jsonl" if table.startswith("{") else "tsv" if "\t" in table else "csv"
    path = folder / f"labels.{kind}"
    path.write_text(table)
    return open_source(str(folder / "photos"), split, LabelOptions(str(path), **columns))


# --- which row means which file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("1.png", ["1.png", "2.png"], [0]),
        ("1", ["1.png", "11.png"], [0]),
        ("a/1", ["a/1.png", "b/1.png"], [0]),
        ("a/1.png", ["x/a/1.png", "x/b/1.png"], [0]),
        ("photos/a/1.png", ["a/1.png", "b/1.png"], [0]),  # from the folder above
        ("/home/other/photos/a/1.png", ["a/1.png", "b/1.png"], [0]),
        ("./a\\1.png", ["a/1.png"], [0]),  # written on Windows
        ("IMG_1.JPG", ["img_1.jpg"], [0]),
        ("img", ["IMG.png", "img.png"], [1]),
        ("e\u0301.png", ["\u00e9.png"], [0]),  # written on macOS
        ("1.5x", ["1.5x.png", "1.png"], [0]),
        ("1.png", ["a/1.png", "1.png"], [1]),
        ("1.png", ["a/1.png", "b/1.png"], [0, 1]),
        ("1", ["1.png", "1.jpg"], [0, 1]),
        ("c/1.png", ["a/1.png", "b/1.png"], []),
        ("1.jpg", ["1.png"], []),
        ("", ["1.png"], []),
        ("0001", ["1.png"], []),
    ],
)
def test_names_mean_files(name: str, files: list[str], expected: list[int]) -> None:
    assert files_of_names([name], "/data/photos", files) == [expected]


def test_a_name_means_the_file_in_the_folder_of_the_split() -> None:
    files = ["test/1.png", "test/2.png", "train/1.png"]
    assert files_of_names(["1", "2"], "/data", files, "train") == [[2], [1]]


def test_names_that_are_longer_than_paths_count_only_if_no_name_is_an_end() -> None:
    # train/1.png is the file itself; test/1.png is another one, that is not here
    assert files_of_names(["train/1.png", "test/1.png"], "/data/train", ["1.png"]) == [[0], []]


@pytest.mark.parametrize(
    "table",
    [
        "image,label\n1.png,dog\n2.png,cat\n",
        "id,breed\n1,dog\n2,cat\n",
        "\ufeffFile Name;Target\n1.png;dog\n2.png;cat\n",
        "image_id\tclass\n1\tdog\n2\tcat\n",
        '{"file_name": "1.png", "label": "dog"}\n{"file_name": "2.png", "label": "cat", "more": [1]}\n',
        "1.png, dog\n2.png, cat\n",  # without names of columns
        "label,path\r\ndog,photos/1.png\r\n\r\ncat,photos/2.png\r\n",
        "nr,file,width,kind\n8,1.png,30,dog\n9,2.png,30,cat\n",
        'caption,filename,category\n"one, two\nthree",1.png,dog\n"",2.png,cat\n',
    ],
)
def test_tables(tmp_path: Path, table: str) -> None:
    make_files(tmp_path / "photos", ["1.png", "2.png"])
    columns = {"label_column": "kind"} if "kind" in table else {}
    source = open_with(tmp_path, table, **columns)
    assert (source.classes, labelled(source)) == (["cat", "dog"], {"1.png": "dog", "2.png": "cat"})
    assert source.notes == []
    assert not source.has_splits


def test_a_list_of_names_and_labels(tmp_path: Path) -> None:
    make_files(tmp_path / "photos", ["1.png", "2.png"])
    (tmp_path / "list.txt").write_text("photos/1.png  7\nphotos/2.png 10\n")
    source = open_source(str(tmp_path / "photos"), "train", LabelOptions(str(tmp_path / "list.txt")))
    assert labelled(source) == {"1.png": "7", "2.png": "10"}


@NEEDS_PYARROW
def test_a_table_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    make_files(tmp_path / "photos", ["1.png", "2.png", "3.png"])
    labels = pyarrow.array(["dog", "cat", None]).dictionary_encode()
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "label": labels}), tmp_path / "labels.parquet")
    source = open_source(str(tmp_path / "photos"), "train", LabelOptions(str(tmp_path / "labels.parquet")))
    assert labelled(source) == {"1.png": "dog", "2.png": "cat"}


def test_labels_of_a_tar(tmp_path: Path) -> None:
    make_files(tmp_path / "photos", ["1.png", "b/2.png"])
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "photos", "")
    (tmp_path / "labels.csv").write_text("image,label\n1.png,dog\nphotos/b/2.png,cat\n")
    source = open_source(str(tmp_path / "photos.tar"), "train", LabelOptions(str(tmp_path / "labels.csv")))
    assert labelled(source) == {"1.png": "dog"}  # a name that begins above the tar
    (tmp_path / "labels.csv").write_text("image,label\nphotos/1.png,dog\nphotos/b/2.png,cat\n")
    source = open_source(str(tmp_path / "photos.tar"), "train", LabelOptions(str(tmp_path / "labels.csv")))
    assert labelled(source) == {"1.png": "dog", "b/2.png": "cat"}


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (["-1", "0", "3"], ["-1", "0", "3"]),
        (["007", "10", "08"], ["007", "08", "10"]),
        (["10", "2", "b"], ["10", "2", "b"]),
        (["class10", "class2"], ["class10", "class2"]),
        (["b", "a", "b"], ["a", "b"]),
    ],
)
def test_the_order_of_classes(names: list[str], expected: list[str]) -> None:
    assert sorted_classes(names) == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "2 ", " 10"], ["1", "2", "10"]),
        (["1.0", "2.", "", "nan"], ["1", "2", "", ""]),
        ([3, 3.0, None, float("nan")], ["3", "3", "", ""]),
        (["cat", "3.0", "NaN"], ["cat", "3.0", ""]),
        ([True, False], ["True", "False"]),
        (["None", "NA"], ["None", "NA"]),
        (["red, ripe", "green"], ["red, ripe", "green"]),
        (["cafe\u0301"], ["caf\u00e9"]),
        (["1.2.3"], ["1.2.3"]),
        (["n03995372 85 1 499 272", "n01773797 7 13 9 1 n01773797 1 2 3 4 ", ""], ["n03995372", "n01773797", ""]),
    ],
)
def test_labels_are_names(labels: list[object], expected: list[str]) -> None:
    assert label_names(labels, "x") == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0.37", "1"], "x: labels such as 0.37 are measurements, not classes"),
        ([0.5, 2.0], "labels such as 0.5 are measurements"),
        (["1e-3", "2"], "labels such as 1e-3 are measurements"),
        (["a|b", "a", "b"], r"a\|b are several labels in one. If images have several, say what separates"),
        (["a, b", "a", "b", "c"], '"a, b" are several labels in one'),
        (["16 0", "5", "7 1 2", ""], "16 0, 7 1 2 are several labels in one"),
        ([["a", "b"]], r"\['a', 'b'\] is not one label"),
        ([{"a": 1}], "is not one label"),
    ],
)
def test_labels_that_are_no_classes(labels: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        label_names(labels, "x")


def test_class_folders_with_numbers_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    make_files(tmp_path, ["1/a.png", "10/a.png", "2/a.png"])
    assert open_source(str(tmp_path), "train").classes == ["1", "2", "10"]


# --- what is counted, and what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "counted"),
    [
        ("3.png,cow\n", "1 missing file (3.png)"),
        ("3.png,cat\n4.png,cat\n", "2 missing files (3.png, ...)"),
        ("b/x.png,\nb/y.png,nan\n", "2 empty labels (b/x.png, ...)"),
        (",cat\n", "1 empty name (row 3)"),
        ("1.png,dog\n", "1 repeated row (1.png)"),
    ],
)
def test_rows_and_files_without_each_other_are_counted(tmp_path: Path, rows: str, counted: str) -> None:
    make_files(tmp_path / "photos", ["1.png", "2.png", "b/x.png", "b/y.png"])
    source = open_with(tmp_path, f"image,label\n1.png,dog\n2.png,cat\n{rows}")
    assert labelled(source) == {"1.png": "dog", "2.png": "cat"}
    assert source.classes == ["cat", "dog"]
    parts = counted.replace("; ", ", ").split(", ")
    if not rows.startswith("b/"):
        parts.append("2 unlabelled images (b/x.png, ...)")
    (note,) = source.notes
    assert note.startswith(f"left out of {tmp_path / 'photos'}: ")
    assert all(part in note for part in parts)


def test_what_is_counted_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_files(tmp_path / "photos", ["1.png", "2.png", "3.png"])
    (tmp_path / "photos" / "labels.csv").write_text("image,label\n1.png,10\n2.png,9\n4.png,9\n")  # beside the images
    options = ["--labels", str(tmp_path / "photos" / "labels.csv"), "--out", str(tmp_path / "out")]
    assert shards_main(["write", "--source", str(tmp_path / "photos"), *options]) == 0
    line = "1 missing file (4.png), 1 unlabelled image (3.png); used are files that end in png"
    assert f"left out of {tmp_path / 'photos'}: {line}" in capsys.readouterr().err
    opened = open_shards(tmp_path / "out")
    assert (opened.manifest.classes, opened.manifest.samples_per_class) == (["9", "10"], [1, 1])
    assert opened.manifest.made["source"] == "images labelled by the column label of labels.csv"


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ("image,label\n1.png,dog\n1.png,cat\n", {}, "1.png has the labels cat, dog"),
        ("image,label\n1.png,dog\n1,cat\n", {}, "1.png has the labels cat, dog"),
        ("image,label\nb.png,dog\n", {}, "b.png may be x/b.png, y/b.png: write more of the path"),
        (
            "image,label\n7.png,dog\n",
            {},
            "no row of .* names an image in .*: column image has 7.png; the images are 1.png",
        ),
        ("image,label\n1.png,\n", {}, "labels no image in .* for train; left out of .*: 2 unlabelled .* 1 empty label"),
        ("a,b\n1.png,7\n", {"image_column": "c"}, "has no column c, only a, b"),
        ("a,b\n1.png,7\n", {"label_column": "c"}, "has no column c, only a, b"),
        (
            "image,width,height\n1.png,7,8\n",
            {},
            "which column has the labels.*--label-column .* among image, width, height",
        ),
        ("image,label,class\n1.png,7,8\n", {}, "which column has the labels.* among image, label, class"),
        ("image,label\n1.png\n", {}, "line 2: 1 value for 2 columns"),
        ("image,label\n1.png,cat\n2.png,dog,3\n", {}, "line 3: 3 values for 2 columns"),
        ("image,image\n1.png,cat\n", {}, "two columns of the name image"),
        ('image,label\n1.png,"cat\n', {}, "line 2: unexpected end of data"),
        ("image,label\n", {}, "has no rows"),
        ("", {}, "has no rows"),
        ('{"image": "1.png"\n', {}, "line 1: Expecting"),
        ('{"image": "1.png", "label": 1}\n[]\n', {}, "line 2: not a mapping of columns to values"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, table: str, columns: dict[str, str], message: str) -> None:
    make_files(tmp_path / "photos", ["1.png", "x/b.png", "y/b.png"])
    with pytest.raises(InputError, match=message):
        open_with(tmp_path, table, **columns)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.xlsx", b"PK", "is no table of labels: give a file that ends in csv, tsv, txt, jsonl, parquet"),
        (
            "labels.csv",
            "image,label\n1.png,\u00e9\n".encode("latin1"),
            "is not UTF-8 from byte 18 on: save it as UTF-8",
        ),
        ("labels.csv", None, "cannot be read .*No such file"),
    ],
)
def test_files_that_are_no_tables(
    tmp_path: Path, name: str, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_files(tmp_path / "photos", ["1.png"])
    if content is not None:
        (tmp_path / name).write_bytes(content)
    options = ["--labels", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert run_command(shards_main, ["write", "--source", str(tmp_path / "photos"), *options]) == 2
    with pytest.raises(InputError, match=message):
        raise InputError(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["digits", "synthetic:10", "cifar10", "mnist", "ARCHIVE", "ARRAYS"])
def test_sources_with_labels_of_their_own(source: str, tmp_path: Path) -> None:
    for name, path in (("ARCHIVE", tmp_path / "cifar-10-python.tar.gz"), ("ARRAYS", tmp_path / "x.npz")):
        path.write_bytes(b"")
        source = str(path) if source == name else source
    with pytest.raises(InputError, match="has labels of its own"):
        open_source(source, "train", LabelOptions("labels.csv"))


def test_columns_without_a_table(tmp_path: Path) -> None:
    make_files(tmp_path, ["a/1.png", "b/1.png"])
    with pytest.raises(InputError, match="has no table whose columns could be chosen"):
        open_source(str(tmp_path), "train", LabelOptions(label_column="x"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"labels\.parquet: to read parquet files, pip install pyarrow"):
        read_table(tmp_path / "labels.parquet", b"PAR1")
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"train\.parquet: to read parquet files, pip install pyarrow"):
        open_source(str(tmp_path), "train")


@NEEDS_PYARROW
def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels\.parquet cannot be read as parquet"):
        read_table(tmp_path / "labels.parquet", b"PAR1 and nothing else")


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "table", "notes"),
    [
        (["1.png", "2.png"], "image,label,split\n1.png,dog,Train\n2.png,cat,test\n", 0),
        (["1.png", "2.png", "3.png"], "file,class,subset\n1,dog,training\n2,cat,test_set\n3,cow,valid\n", 1),
        (["train/1.png", "test/2.png"], "image,label\ntrain/1.png,dog\ntest/2.png,cat\n", 0),
        (["train/1.png", "test/2.png"], "image,label\n1.png,dog\n2.png,cat\n", 0),
        (["train/1.png", "test/1.png", "test/2.png"], "image,label\n1,dog\n2,cat\n", 0),
    ],
)
def test_splits(tmp_path: Path, files: list[str], table: str, notes: int) -> None:
    make_files(tmp_path / "photos", files)
    for split, number, name in (("train", "1.png", "dog"), ("test", "2.png", "cat")):
        source = open_with(tmp_path, table, split)
        assert source.classes == (["cat", "cow", "dog"] if "cow" in table else ["cat", "dog"])  # those of both splits
        if not (split == "test" and "test/1.png" in files):
            assert {path.rpartition("/")[2]: label for path, label in labelled(source).items()} == {number: name}
        assert source.has_splits


def test_a_table_for_each_split(tmp_path: Path) -> None:
    make_files(tmp_path / "photos", ["1.png", "2.png"])
    (tmp_path / "train.csv").write_text("image,label\n1.png,dog\n")
    (tmp_path / "test.csv").write_text("image,label\n2.png,dog\n")
    options = LabelOptions(str(tmp_path / "{split}.csv"))
    assert make_missing_shards(str(tmp_path / "photos"), "train", tmp_path / "out" / "train", options)
    assert make_missing_shards(str(tmp_path / "photos"), "test", tmp_path / "out" / "test", options)
    manifest = open_shards(tmp_path / "out" / "test").manifest
    assert manifest.samples == 1
    assert not surely_differs(str(tmp_path / "photos"), manifest, "test", options)
    assert surely_differs(str(tmp_path / "photos"), manifest, "train", options)


def test_a_split_without_rows(tmp_path: Path) -> None:
    make_files(tmp_path / "photos", ["1.png", "2.png"])
    with pytest.raises(InputError, match=r"labels no image in .* for test; .*not used for test: 1 of train, 1 of val"):
        open_with(tmp_path, "image,label,split\n1.png,dog,train\n2.png,cat,val\n", "test")


@pytest.mark.parametrize(
    ("made_from", "options", "differs"),
    [
        ("images labelled by the column breed of labels.csv", LabelOptions("x/labels.csv"), False),
        (
            "images labelled by the column breed of labels.csv",
            LabelOptions("x/labels.csv", label_column="breed"),
            False,
        ),
        ("images labelled by the column breed of labels.csv", LabelOptions("x/labels.csv", label_column="age"), True),
        ("images labelled by the column breed of labels.csv", LabelOptions("other.csv"), True),
        ("images labelled by the column breed of labels.csv", LabelOptions(), False),  # or of metadata.csv
        ("image folder", LabelOptions("labels.csv"), True),
        ("tars written elsewhere", LabelOptions("labels.csv"), False),
    ],
)
def test_shards_with_other_labels_are_known_by_their_description(
    made_from: str, options: LabelOptions, differs: bool, shards: Path, tmp_path: Path
) -> None:
    make_files(tmp_path, ["train/a/1.png", "test/a/1.png"])
    manifest = replace(open_shards(shards / "train").manifest, made={"source": made_from})
    assert surely_differs(str(tmp_path), manifest, "train", options) == differs


def test_a_recipe_names_the_table(tmp_path: Path) -> None:
    make_files(tmp_path / "photos", ["1.png", "2.png", "3.png"])
    (tmp_path / "labels.csv").write_text("file,age,kind,split\n1,7,b,train\n2,8,a,train\n3,9,a,test\n")
    table, columns = str(tmp_path / "labels.csv"), {"image_column": "file", "label_column": "kind"}
    folders = {split: str(tmp_path / "out" / split) for split in ("train", "test")}
    config = DataConfig(source=str(tmp_path / "photos"), labels=table, **folders, **columns)
    make_missing_data(config)
    parts = open_parts(config)
    assert (parts.train.manifest.classes, parts.final.manifest.samples_per_class) == (["a", "b"], [1, 0])


# --- Hugging Face's imagefolder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", pytest.param("parquet", marks=NEEDS_PYARROW)])
@pytest.mark.parametrize("place", ["", "train/"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_metadata_beside_the_images(tmp_path: Path, kind: str, place: str, packed: bool) -> None:
    root = make_files(tmp_path / "set", ["train/1.png", "train/more/2.png", "test/1.png"])
    rows = {f"{'' if place else 'train/'}{name}": label for name, label in (("1.png", 10), ("more/2.png", 9))}
    path = root / place / f"metadata.{kind}"
    if kind == "csv":
        path.write_text("file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows.items()))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"file_name": n, "label": label}) + "\n" for n, label in rows.items()))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"file_name": list(rows), "label": list(rows.values())}), path)
    if packed:
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            tar.add(root, "")
        root = tmp_path / "set.tar"
    source = open_source(str(root), "train")
    assert (source.classes, labelled(source)) == (["9", "10"], {"train/1.png": "10", "train/more/2.png": "9"})
    assert source.has_splits
    assert source.notes == []


@pytest.mark.parametrize(
    "table", ["file_name,text\na/1.png,a cat\n", "name,label\na/1.png,cat\n", "no\ntable,at,all\n", ""]
)
def test_metadata_without_labels_leave_class_folders_as_they_are(tmp_path: Path, table: str) -> None:
    make_files(tmp_path, ["a/1.png", "b/2.png"])
    (tmp_path / "metadata.csv").write_text(table)
    source = open_source(str(tmp_path), "train")
    assert labelled(source) == {"a/1.png": "a", "b/2.png": "b"}
    assert "1 .csv file (metadata.csv)" in source.notes[0]


def test_a_column_of_metadata_can_be_chosen(tmp_path: Path) -> None:
    make_files(tmp_path, ["1.png", "2.png"])
    (tmp_path / "metadata.csv").write_text("file_name,label,shape\n1.png,x,round\n2.png,x,flat\n")
    assert open_source(str(tmp_path), "train", LabelOptions(label_column="shape")).classes == ["flat", "round"]
