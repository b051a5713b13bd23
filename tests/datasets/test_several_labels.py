"""Several labels for each image: every form of them means the same, they are kept in the shards, and damage is found."""

import csv
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardstep.configs.errors import InputError
from shardstep.datasets.class_mapping import map_classes
from shardstep.datasets.label_sets import LabelSets
from shardstep.datasets.manifest import LABELS_NAME, ShardFolder, open_shards
from shardstep.datasets.overlap import count_shared
from shardstep.datasets.parts import Part, hold_out
from shardstep.datasets.sources import open_source
from shardstep.datasets.sources.source import Source
from shardstep.datasets.sources.tables import LabelOptions
from shardstep.datasets.verify import verify_shards
from shardstep.datasets.write import write_shards
from shardstep.launch.shards import main as shards_main
from tests.datasets.test_sources import png
from tests.datasets.test_tar import write_tar

# Four images: with two labels, with one, with none, with all three. The splits alternate.
LABELS = {"0.png": ["cat", "dog"], "1.png": ["dog"], "2.png": [], "3.png": ["bird", "cat", "dog"]}


def csv_of(rows: list[list[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerows(rows)
    return stream.getvalue()


def texts(separator: str) -> str:
    return csv_of([["image", "tags"], *([name, separator.join(labels)] for name, labels in LABELS.items())])


def shares(*columns: str) -> str:
    return csv_of([
        ["image", *columns],
        *([name, *(int(column in labels) for column in columns)] for name, labels in LABELS.items()),
    ])  # fmt: skip


FORMS: dict[str, tuple[str, str, dict[str, str]]] = {
    "lists": ("jsonl", "\n".join(json.dumps({"image": n, "tags": t}) for n, t in LABELS.items()), {}),
    "objects": (
        "jsonl",
        "\n".join(json.dumps({"image": n, "tags": dict.fromkeys(t, 1)}) for n, t in LABELS.items()),
        {"label_column": "tags"},
    ),
    "bars": ("csv", texts("|"), {"separator": "|"}),
    "commas": ("csv", texts(", "), {"separator": ","}),
    "blanks": ("csv", texts(" "), {"separator": " "}),
    "columns": ("csv", shares("bird", "cat", "dog"), {}),
    "columns that are given": ("csv", shares("cat", "dog", "bird"), {"label_column": "bird, cat, dog"}),
    "true and false": ("csv", shares("bird", "cat", "dog").replace("1", "True").replace("Truepng", "1.png"), {}),
    "rows": (
        "csv",
        csv_of([["image", "label"], ["2.png", ""], *([n, label] for n, t in LABELS.items() for label in t)]),
        {"separator": "|"},
    ),
}


def open_labelled(folder: Path, kind: str, table: str, options: dict[str, str]) -> Source:
    for name in LABELS:
        (folder / "photos").mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(png(int(name[0])))
    (folder / f"labels.{kind}").write_text(table)
    return open_source(str(folder / "photos"), "train", LabelOptions(str(folder / f"labels.{kind}"), **options))


def labels_by_name(source: Source) -> dict[str, list[str]]:
    assert isinstance(source.labels, LabelSets)
    return {
        source.name(number): sorted(source.classes[label] for label, share in source.labels.of(number) if share == 1)
        for number in range(len(source.labels))
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_means_the_same(tmp_path: Path, form: str) -> None:
    kind, table, options = FORMS[form]
    if form == "true and false":
        table = shares("bird", "cat", "dog").replace(",0", ",False").replace(",1", ",True")
        options = {"label_column": "bird,cat,dog"}
    source = open_labelled(tmp_path, kind, table, options)
    assert source.classes == ["bird", "cat", "dog"]
    assert labels_by_name(source) == LABELS


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="no pyarrow here")
@pytest.mark.parametrize("feature", ["list", "List", "Sequence"])
def test_lists_in_parquet_files(tmp_path: Path, feature: str) -> None:
    from tests.datasets.test_parquet import write_parquet

    names = {"_type": "ClassLabel", "names": ["bird", "cat", "dog"]}
    about = {"labels": [names] if feature == "list" else {"_type": feature, "feature": names}}
    numbers = [[["bird", "cat", "dog"].index(label) for label in labels] for labels in LABELS.values()]
    write_parquet(tmp_path / "set" / "train.parquet", {"labels": numbers}, about)
    write_parquet(
        tmp_path / "set" / "test.parquet", {"labels": [[1]]}, about, first=4
    )  # one label, but of the same kind
    train, test = (open_source(str(tmp_path / "set"), split) for split in ("train", "test"))
    assert [sorted(some) for some in labels_by_name(train).values()] == list(LABELS.values())
    assert list(labels_by_name(test).values()) == [["cat"]]


def test_a_share_for_each_class_in_arrays(tmp_path: Path) -> None:
    """As in MedMNIST's chestmnist.npz."""
    from tests.datasets.test_known_forms import write_arrays

    rows = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=np.uint8)
    one_each = np.eye(3, dtype=np.uint8)[:2]
    path = write_arrays(tmp_path / "a.npz", (5, 4), train_labels=rows, val_labels=one_each, test_labels=one_each)
    train, test = (open_source(str(path), split) for split in ("train", "test"))
    assert list(labels_by_name(train).values()) == [["0", "2"], [], ["1"], ["1", "2"]]
    assert list(labels_by_name(test).values()) == [["0"], ["1"]]
    one_label = np.eye(3, dtype=np.uint8)[[0, 1, 2, 0]]
    path = write_arrays(tmp_path / "b.npz", (5, 4), train_labels=one_label,
                        val_labels=one_each, test_labels=one_each)  # fmt: skip
    one = open_source(str(path), "train")
    assert isinstance(one.labels, np.ndarray)  # each image has one label
    assert one.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("kind", "table", "options", "message"),
    [
        ("csv", "image,label\n0.png,cat\n0.png,dog\n", {}, "0.png has the labels cat, dog"),
        (
            "csv",
            "image,cat,dog\n0.png,1,-1\n",
            {"label_column": "cat,dog"},
            "dog has -1: the share of a label is a number",
        ),
        ("csv", "image,cat,dog\n0.png,1,x\n", {"label_column": "cat,dog"}, "dog has x: the share"),
        ("csv", "image,cat,dog\n0.png,1,0\n", {"label_column": "cat,cow"}, "has no column cow, only image, cat, dog"),
        ("jsonl", '{"image": "0.png", "label": [["a"], ["b", "c"]]}', {}, "is not one label"),
        ("jsonl", '{"image": "0.png", "label": {"cat": 7}}', {}, "cat has 7: the share"),
        ("csv", "image,label\n0.png,a|b\n1.png,a\n2.png,b\n", {}, "say what separates them with --label-separator"),
    ],
)
def test_labels_that_are_refused(tmp_path: Path, kind: str, table: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_labelled(tmp_path, kind, table, options)


def test_a_column_for_each_class_is_one_label_if_each_image_has_one(tmp_path: Path) -> None:
    source = open_labelled(tmp_path, "csv", "image,cat,dog\n0.png,1,0\n1.png,0,1\n", {})
    assert isinstance(source.labels, np.ndarray)
    assert [source.classes[label] for label in source.labels] == ["cat", "dog"]


# --- in shards --------------------------------------------------------------------------------------------------------


def written(folder: Path, form: str = "bars") -> ShardFolder:
    kind, table, options = FORMS[form]
    open_labelled(folder, kind, table, options)
    labels = LabelOptions(str(folder / f"labels.{kind}"), **options)
    write_shards(str(folder / "photos"), "train", folder / "out", samples_per_shard=3, labels=labels)
    return open_shards(folder / "out")


def names_of(shards: ShardFolder) -> list[list[str]]:
    return [sorted(shards.manifest.classes[label] for label, _ in shards.labels_of(n)) for n in range(4)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_shards_keep_the_labels_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gc

    import webdataset

    shards = written(tmp_path)
    assert "1 image of 4 without a label" in capsys.readouterr().err
    assert sorted(names_of(shards)) == sorted(LABELS.values())
    assert shards.manifest.samples_per_class == [1, 2, 3]
    paths = [str(shards.shard_path(number)) for number in range(2)]
    read = [sample["json"]["labels"] for sample in webdataset.WebDataset(paths, shardshuffle=False).decode()]
    gc.collect()  # closes the files that webdataset leaves open
    assert [sorted(labels) for labels in read] == names_of(shards)
    dense = shards.targets(np.array([3, 0]))
    assert dense.dtype == np.float32
    assert [[shards.manifest.classes[label] for label in row.nonzero()[0]] for row in dense] == [
        names_of(shards)[3],
        names_of(shards)[0],
    ]
    assert verify_shards(tmp_path / "out") == []


def test_shares_of_labels_are_kept(tmp_path: Path) -> None:
    table = "\n".join(json.dumps({"image": f"{n}.png", "label": {"cat": 0.7, "dog": 0.3}}) for n in range(4))
    open_labelled(tmp_path, "jsonl", table, {})
    options = LabelOptions(str(tmp_path / "labels.jsonl"))
    write_shards(str(tmp_path / "photos"), "train", tmp_path / "out", labels=options)
    shards = open_shards(tmp_path / "out")
    assert shards.targets(np.arange(4)).tolist() == np.float32([[0.7, 0.3]] * 4).tolist()
    assert b'{"labels": {"cat": 0.7, "dog": 0.3}}' in shards.shard_path(0).read_bytes()
    assert verify_shards(tmp_path / "out") == []


def test_an_index_made_again_is_the_same(tmp_path: Path) -> None:
    before = written(tmp_path)
    assert shards_main(["index", str(tmp_path / "out"), "--force"]) == 0
    after = open_shards(tmp_path / "out")
    assert names_of(after) == names_of(before)
    assert after.manifest.labels_sha256 == before.manifest.labels_sha256


@pytest.mark.parametrize(
    ("second", "third", "expected"),
    [
        (["cat"], ["dog"], None),  # one label each
        (["cat", "dog"], ["dog"], [["cat"], ["cat", "dog"], ["dog"]]),
        ([], ["dog"], [["cat"], [], ["dog"]]),
        ([0, 1], [1], [["0"], ["0", "1"], ["1"]]),
    ],
)
def test_lists_in_tars_of_others(tmp_path: Path, second: list, third: list, expected: list | None) -> None:
    (tmp_path / "x").mkdir()
    lists = [[0] if second == [0, 1] else ["cat"], second, third]
    members = {}
    for number, labels in enumerate(lists):
        members |= {f"{number}.png": png(number), f"{number}.json": json.dumps({"tags": labels}).encode()}
    write_tar(tmp_path / "x" / "a.tar", members)
    assert shards_main(["index", str(tmp_path / "x"), "--label", "json:tags"]) == 0
    shards = open_shards(tmp_path / "x")
    assert shards.manifest.has_several_labels == (expected is not None)
    if expected:
        classes = shards.manifest.classes
        assert [sorted(classes[label] for label, _ in shards.labels_of(n)) for n in range(3)] == expected


def test_damage_is_found(tmp_path: Path) -> None:
    shards = written(tmp_path)
    path = shards.shard_path(0)
    data = path.read_bytes()
    place = data.index(b'"dog"')
    path.write_bytes(data[: place + 1] + b"c" + data[place + 2 :])
    (found,) = [line for line in verify_shards(tmp_path / "out") if "label of sample" in line]
    assert "is damaged" in found
    path.write_bytes(data)
    labels = (tmp_path / "out" / LABELS_NAME).read_bytes()
    (tmp_path / "out" / LABELS_NAME).write_bytes(labels[:-1] + b"\x01")
    with pytest.raises(InputError, match=f"{LABELS_NAME} is damaged: its SHA-256"):
        open_shards(tmp_path / "out")
    (tmp_path / "out" / LABELS_NAME).unlink()
    with pytest.raises(InputError, match=f"{LABELS_NAME} is missing"):
        open_shards(tmp_path / "out")


def test_options_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_labelled(tmp_path, "csv", texts("|"), {"separator": "|"})
    write = ["shards", "write", "--source", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
    assert shards_main([*write[1:], "--labels", str(tmp_path / "labels.csv"), "--label-separator", "|"]) == 0
    assert open_shards(tmp_path / "out").manifest.samples_per_class == [1, 2, 3]


def test_the_rarest_label_is_what_a_choice_is_balanced_by() -> None:
    labels = LabelSets.of_names(
        [(("a", 1.0), ("b", 1.0)), (("a", 1.0),), (), (("c", 1.0), ("a", 1.0))], {"a": 0, "b": 1, "c": 2}
    )
    assert labels.rarest().tolist() == [1, 0, -1, 2]
    assert [len(labels[np.array([3, 2])]), labels[np.array([3, 2])].of(0)] == [2, [(2, 1.0), (0, 1.0)]]


def test_each_label_has_its_share_of_what_is_held_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = {}
    for number in range(200):
        labels = [name for name, odds in (("often", 0.7), ("seldom", 0.1)) if rng.random() < odds]
        members |= {
            f"{number:03d}.png": png(1),
            f"{number:03d}.json": json.dumps({"t": labels}).encode(),
        }
    (tmp_path / "x").mkdir()
    write_tar(tmp_path / "x" / "a.tar", members)
    shards_main(["index", str(tmp_path / "x"), "--label", "json:t"])
    shards = open_shards(tmp_path / "x")
    train, validation = hold_out(shards, 0.25, 0)
    whole, held_out = shards.manifest.samples_per_class, validation.samples_per_class().tolist()
    assert held_out == pytest.approx([0.25 * count for count in whole], abs=2)
    assert (train.samples_per_class() + validation.samples_per_class()).tolist() == whole


def test_another_order_of_classes_is_mapped_by_name(tmp_path: Path) -> None:
    shards = written(tmp_path)
    mapped, note = map_classes(shards, ["dog", "cow", "cat", "bird"], "x")
    assert note == "x has other classes than the model: classes are matched by name; only the model has cow"
    assert names_of(mapped) == names_of(shards)
    assert mapped.manifest.samples_per_class == [3, 0, 2, 1]
    with pytest.raises(InputError, match=r"classes that the model does not know: dog \(3 images\)"):
        map_classes(shards, ["cat", "bird"], "x")


def test_shared_images_are_found(tmp_path: Path) -> None:
    shards = written(tmp_path)
    _, held_out = hold_out(shards, 0.5, 0)
    assert count_shared(held_out, Part(shards)) == (2, 2)
