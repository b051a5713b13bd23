"""Images in parquet and Arrow files, made as Hugging Face's datasets makes them."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from shardstep.configs.errors import InputError
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.sources import open_source, surely_differs
from shardstep.datasets.sources.tables import LabelOptions
from shardstep.datasets.write import make_missing_shards, write_shards
from tests.datasets.test_labels import labelled
from tests.datasets.test_sources import pixels_of, png

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CLASS_LABEL = {"names": ["dog", "cat", "cow"], "_type": "ClassLabel"}


def write_parquet(path: Path, columns: dict[str, list[Any]], features: dict[str, Any] | None, first: int = 0) -> None:
    """Write images of the values first, first + 1, ... in a struct of bytes and path, and other columns."""
    count = len(next(iter(columns.values())))
    images = [{"bytes": png(first + number), "path": f"{first + number}.png"} for number in range(count)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(images, kind), **columns})
    if features is not None:
        about = json.dumps({"info": {"features": {"image": {"_type": "Image"}, **features}}})
        table = table.replace_schema_metadata({"huggingface": about})
    write_table(path, table)


def write_table(path: Path, table: Any) -> None:
    """Write a parquet file, or by the path's end an Arrow stream, as save_to_disk does, or file; two rows together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
        return
    new = pyarrow.ipc.new_file if path.stem.endswith("indexed") else pyarrow.ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def values_and_classes(folder: Path | str, split: str, options: LabelOptions | None = None) -> dict[int, str]:
    source = open_source(str(folder), split, options or LabelOptions())
    classes = [source.classes[label] for label in source.labels.tolist()]
    return {int(pixels_of(source, number)[0, 0, 0]): name for number, name in enumerate(classes)}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("plain_text/train/0000.parquet", "plain_text/test/0000.parquet"),
        ("train.parquet", "test.parquet"),
        ("train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"),  # of save_to_disk
        ("cifar10-train.arrow", "cifar10-test.arrow"),  # of its cache
        ("train-indexed.arrow", "test-indexed.arrow"),
        ("Train.ARROW", "Test.ARROW"),
        ("train/part-0.parquet", "test/part-0.parquet"),
        ("mnist_train.parquet", "mnist_test.parquet"),
        ("data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "data/test-00000-of-00001-20b1bd3a3ac7ff4b.parquet"),
    ],
)
def test_files_of_splits(tmp_path: Path, train: str, test: str) -> None:
    write_parquet(tmp_path / "set" / train, {"label": [0, 2, 2, 0, 2]}, {"label": CLASS_LABEL})
    write_parquet(tmp_path / "set" / test, {"label": [1]}, {"label": CLASS_LABEL}, first=10)
    (tmp_path / "set" / "README.md").write_text("---\ndataset_info: ...\n---\n")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    # What map leaves beside a saved data set.
    write_parquet((tmp_path / "set" / train).parent / "cache-19c9106c82b6516a.arrow", {"label": [1]}, None, first=99)
    assert values_and_classes(tmp_path / "set", "train") == {0: "dog", 1: "cow", 2: "cow", 3: "dog", 4: "cow"}
    assert values_and_classes(tmp_path / "set", "test") == {10: "cat"}
    source = open_source(str(tmp_path / "set"), "test")
    assert (source.classes, source.has_splits) == (["dog", "cat", "cow"], True)  # in the order of the file
    assert source.name(0) == f"{test}: 10.png"


def test_several_files_of_a_split(tmp_path: Path) -> None:
    for part in range(3):
        path = tmp_path / "data" / f"train-0000{part}-of-00003.parquet"
        write_parquet(path, {"label": [part, 0]}, {"label": CLASS_LABEL}, first=2 * part)
    expected = {0: "dog", 1: "dog", 2: "cat", 3: "dog", 4: "cow", 5: "dog"}
    assert values_and_classes(tmp_path, "train") == expected
    with pytest.raises(InputError, match="has no parquet files of test, only of train: give the files' folder, or one"):
        open_source(str(tmp_path), "test")


def test_a_single_file_is_used_in_full(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00001.parquet", {"label": [0, 1]}, {"label": CLASS_LABEL})
    assert values_and_classes(tmp_path / "train-00000-of-00001.parquet", "test") == {0: "dog", 1: "cat"}
    with pytest.raises(InputError, match="both sets would hold the same images"):
        make_missing_shards(str(tmp_path / "train-00000-of-00001.parquet"), "test", tmp_path / "out")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([10, 9, 10], ["9", "10"]), (["b", "a", "b"], ["a", "b"]), ([1.0, None, 2.0], ["1", "2"])],
)
def test_labels_without_names(tmp_path: Path, labels: list[Any], expected: list[str]) -> None:
    write_parquet(tmp_path / "train.parquet", {"label": labels}, None)
    assert open_source(str(tmp_path), "train").classes == expected


def test_both_splits_have_the_classes_of_both(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", {"breed": ["a", "c"]}, None)
    write_parquet(tmp_path / "test.parquet", {"breed": ["b"]}, None)
    for split in ("train", "test"):
        manifest = write_shards(str(tmp_path), split, tmp_path / "out" / split)
        assert manifest.classes == ["a", "b", "c"]
        assert not surely_differs(str(tmp_path), manifest, split)


def test_a_column_can_be_chosen(tmp_path: Path) -> None:
    columns = {"fine_label": [0, 1], "coarse_label": [1, 0]}
    write_parquet(tmp_path / "train.parquet", columns, dict.fromkeys(columns, CLASS_LABEL))
    with pytest.raises(InputError, match="which column has the labels.* among image, fine_label, coarse_label"):
        open_source(str(tmp_path), "train")
    options = LabelOptions(label_column="coarse_label")
    assert values_and_classes(tmp_path, "train", options) == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    ("columns", "features", "options", "message"),
    [
        ({"label": [0, 3]}, {"label": CLASS_LABEL}, {}, "column label: label 3 is out of range: it names 3 classes"),
        ({"label": [-1, -1]}, {"label": CLASS_LABEL}, {}, "no row of train.parquet has a label in the column label"),
        ({"width": [3, 4], "text": ["a", "b"]}, None, {}, "which column has the labels.* among image, width, text"),
        ({"label": [0, 1]}, None, {"label_column": "x"}, "has no column x, only image, label"),
        ({"label": [0, 1]}, None, {"image_column": "x"}, "has no column x, only image, label"),
        ({"label": [0, 1], "mask": [png(1), png(2)]}, None, {"image_column": "mask"}, ""),
    ],
)
def test_columns_that_are_refused(
    tmp_path: Path, columns: dict[str, Any], features: dict[str, Any] | None, options: dict[str, str], message: str
) -> None:
    write_parquet(tmp_path / "train.parquet", columns, features)
    if not message:
        assert set(values_and_classes(tmp_path, "train", LabelOptions(**options, label_column="label"))) == {1, 2}
        return
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path), "train", LabelOptions(**options))


def test_rows_without_a_label_are_counted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", {"label": [0, -1, None, 1]}, {"label": CLASS_LABEL})
    source = open_source(str(tmp_path), "train")
    assert labelled(source) == {"train.parquet: 0.png": "dog", "train.parquet: 3.png": "cat"}
    assert source.notes == [
        f"left out of {tmp_path}: 2 empty labels (train.parquet: row 2, ...); used are rows with image and label"
    ]


@pytest.mark.parametrize("extension", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_images_that_are_bytes_keep_their_format(tmp_path: Path, kind: str, extension: str) -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (9, 9, 9)).save(buffer, "jpeg")
    images = pyarrow.array([png(1), buffer.getvalue()], getattr(pyarrow, kind)())
    write_table(tmp_path / f"train.{extension}", pyarrow.table({"id": [1, 2], "jpg": images, "class": ["a", "b"]}))
    assert write_shards(str(tmp_path), "train", tmp_path / "out").encodings == ["jpg", "png"]
    assert open_shards(tmp_path / "out").manifest.classes == ["a", "b"]


def test_images_without_bytes_are_bad_images(tmp_path: Path) -> None:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = pyarrow.array([{"bytes": png(1), "path": None}, {"bytes": None, "path": "/home/x/2.png"}, None], kind)
    parquet.write_table(pyarrow.table({"image": images, "label": ["a", "b", "a"]}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"2\.png: cannot be read: the file holds no bytes for it\n.*row 3: "):
        write_shards(str(tmp_path), "train", tmp_path / "out")
    assert write_shards(str(tmp_path), "train", tmp_path / "out", bad_images="skip").samples == 1


def test_a_damaged_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", {"label": [0, 1]}, {"label": CLASS_LABEL})
    intact = (tmp_path / "train.parquet").read_bytes()
    footer = struct.unpack("<I", intact[-8:-4])[0]
    for content in (
        b"",
        b"PAR1",
        intact[:-20],
        intact[: len(intact) // 2],
        intact[:-8] + struct.pack("<I", footer + 9**6) + b"PAR1",
    ):
        (tmp_path / "train.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"train\.parquet cannot be read as parquet"):
            open_source(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["train.arrow", "train-indexed.arrow"])
def test_a_damaged_arrow_file(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / name, {"label": [0, 1, 2, 0]}, {"label": CLASS_LABEL})
    intact = (tmp_path / name).read_bytes()
    # Without its last 8 bytes, a stream still has whole batches.
    for content in (b"", b"ARROW1", intact[:10], intact[: len(intact) // 2], intact[:-8], b"x" * 100):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} cannot be read as arrow"):
            open_source(str(tmp_path), "train")


def test_a_set_that_was_saved_is_written_whole_from_a_file_or_its_folder(tmp_path: Path) -> None:
    for part in range(2):
        path = tmp_path / "saved" / f"data-0000{part}-of-00002.arrow"
        write_parquet(path, {"label": [part, 2]}, {"label": CLASS_LABEL}, first=2 * part)
    expected = {0: "dog", 1: "cow", 2: "cat", 3: "cow"}
    assert values_and_classes(tmp_path / "saved", "test") == expected
    assert values_and_classes(tmp_path / "saved" / "data-00001-of-00002.arrow", "train") == {2: "cat", 3: "cow"}
    manifest = write_shards(str(tmp_path / "saved"), "train", tmp_path / "out")
    assert manifest.made["source"] == "images in arrow files"
    assert not surely_differs(str(tmp_path / "saved"), manifest, "train")
    with pytest.raises(InputError, match="both sets would hold the same images"):
        make_missing_shards(str(tmp_path / "saved"), "test", tmp_path / "test")


def test_files_of_both_kinds_are_refused(tmp_path: Path) -> None:
    for name in ("train.parquet", "train.arrow"):
        write_parquet(tmp_path / name, {"label": [0]}, {"label": CLASS_LABEL})
    with pytest.raises(InputError, match="has parquet and Arrow files: give the folder of one kind"):
        open_source(str(tmp_path), "train")


def test_a_folder_of_images_with_a_parquet_file_beside_them_is_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "statistics.parquet").write_bytes(b"PAR1")
    assert open_source(str(tmp_path), "train").classes == ["a", "b"]
