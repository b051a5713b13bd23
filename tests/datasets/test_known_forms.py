"""Data sets in the form in which they are published: ImageNet, Tiny ImageNet, MedMNIST."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardstep.configs.errors import InputError
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.sources import open_source, surely_differs
from shardstep.datasets.sources.source import Source
from shardstep.datasets.sources.tables import LabelOptions
from shardstep.datasets.write import write_shards
from tests.datasets.test_sources import pixels_of, png
from tests.datasets.test_tar import write_tar


def classes_of_values(source: Source) -> dict[int, str]:
    """The class of each image, by the value of its pixels."""
    classes = [source.classes[label] for label in source.labels.tolist()]
    return {int(pixels_of(source, number)[0, 0, 0]): name for number, name in enumerate(classes)}


# --- Tiny ImageNet ----------------------------------------------------------------------------------------------------

WORDS = "n00000003\tgoldfish, Carassius auratus\nn00000001\tcrane\nn00000002\tcrane\nn00000009\tentity\n"


def make_tiny_imagenet(root: Path) -> Path:
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    (root / "test" / "images" / "test_0.JPEG").write_bytes(png(99))
    (root / "wnids.txt").write_text("n00000003\nn00000001\nn00000002\n")
    (root / "words.txt").write_text(WORDS)
    rows = []
    for number in range(1, 4):
        wnid = f"n0000000{number}"
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
        (root / "train" / wnid / "images" / f"{wnid}_0.JPEG").write_bytes(png(number))
        (root / "val" / "images" / f"val_{number}.JPEG").write_bytes(png(10 + number))
        rows.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return root


TINY_CLASSES = ["crane (n00000001)", "crane (n00000002)", "goldfish"]  # in the order of their wnids


@pytest.mark.parametrize("outer", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(tmp_path: Path, outer: str) -> None:
    make_tiny_imagenet(tmp_path / outer)
    train, test = (open_source(str(tmp_path), split) for split in ("train", "test"))
    assert train.classes == test.classes == TINY_CLASSES
    assert classes_of_values(train) == dict(zip((1, 2, 3), TINY_CLASSES, strict=True))
    assert classes_of_values(test) == dict(zip((11, 12, 13), TINY_CLASSES, strict=True))
    assert train.has_splits
    assert test.has_splits
    manifest = write_shards(str(tmp_path), "test", tmp_path / "out")
    assert manifest.samples_per_class == [1, 1, 1]
    assert not surely_differs(str(tmp_path), manifest, "test")


def test_tiny_imagenet_without_words_or_with_sorted_validation_images(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    (tmp_path / "words.txt").unlink()
    (tmp_path / "val" / "n00000001").mkdir()
    (tmp_path / "val" / "images" / "val_1.JPEG").rename(tmp_path / "val" / "n00000001" / "val_1.JPEG")
    (tmp_path / "val" / "images" / "val_2.JPEG").unlink()
    source = open_source(str(tmp_path), "test")
    assert classes_of_values(source) == {11: "n00000001", 13: "n00000003"}
    assert "1 missing file (val_2.JPEG)" in source.notes[0]
    (tmp_path / "val" / "val_annotations.txt").write_text("val_1.JPEG n00000001\n")
    with pytest.raises(InputError, match=r"val_annotations\.txt has a line without a tab"):
        open_source(str(tmp_path), "test")


# --- ImageNet ---------------------------------------------------------------------------------------------------------

WNIDS = ["n00000002", "n00000003", "n00000001"]  # of the ids 1, 2, 3


def make_devkit() -> dict[str, bytes]:
    from scipy.io import savemat

    fields = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
    ]
    synsets = np.empty((4, 1), dtype=fields)
    for row, wnid in enumerate([*WNIDS, "n00000009"]):
        children = [[1, 2, 3]] if row == 3 else []
        synsets[row, 0] = (row + 1, wnid, f"word of {wnid}, x", "a gloss", 3 if row == 3 else 0, children)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    folder = "ILSVRC2012_devkit_t12/data"
    truth = b"3\n1\n2\n3\n"
    return {f"{folder}/meta.mat": buffer.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth}


def make_imagenet(root: Path, packed_kit: bool = True) -> Path:
    root.mkdir(exist_ok=True)
    inner = {}
    for number, wnid in enumerate(sorted(WNIDS), 1):
        tar = write_tar(root / "inner.tar", {f"{wnid}_{place}.JPEG": png(10 * number + place) for place in range(2)})
        inner[f"{wnid}.tar"] = tar.read_bytes()
        tar.unlink()
    write_tar(root / "ILSVRC2012_img_train.tar", inner)
    write_tar(root / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_{n:08d}.JPEG": png(n) for n in range(1, 5)})
    kit = make_devkit()
    if packed_kit:
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            for name, content in kit.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        for name, content in kit.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    return root


TRAIN_VALUES = {number * 10 + place: f"n0000000{number}" for number in (1, 2, 3) for place in (0, 1)}
VAL_VALUES = {1: "n00000001", 2: "n00000002", 3: "n00000003", 4: "n00000001"}


@pytest.mark.parametrize("packed_kit", [True, False])
def test_archives_of_imagenet(tmp_path: Path, packed_kit: bool) -> None:
    make_imagenet(tmp_path, packed_kit)
    train, test = (open_source(str(tmp_path), split) for split in ("train", "test"))
    assert train.classes == test.classes == sorted(WNIDS)
    assert classes_of_values(train) == TRAIN_VALUES
    assert classes_of_values(test) == VAL_VALUES
    assert write_shards(str(tmp_path / "ILSVRC2012_img_train.tar"), "train", tmp_path / "out").samples == 6
    assert test.has_splits


def test_a_flat_folder_of_validation_images(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar") as tar:
        tar.extractall(tmp_path / "val", filter="data")
    (tmp_path / "ILSVRC2012_img_val.tar").unlink()
    assert classes_of_values(open_source(str(tmp_path), "test")) == VAL_VALUES
    table = "ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{number:08d},{wnid} 85 1 499 272 \n" for number, wnid in VAL_VALUES.items()
    )
    (tmp_path / "LOC_val_solution.csv").write_text(table)
    source = open_source(str(tmp_path / "val"), "test", LabelOptions(str(tmp_path / "LOC_val_solution.csv")))
    assert classes_of_values(source) == VAL_VALUES


@pytest.mark.parametrize("damage", ["missing", "no archive", "no members", "short"])
def test_validation_images_without_labels(tmp_path: Path, damage: str) -> None:
    make_imagenet(tmp_path)
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    if damage == "missing":
        kit.unlink()
    elif damage == "no archive":
        kit.write_bytes(b"not an archive")
    elif damage == "short":
        kit.write_bytes(kit.read_bytes()[:-40])
    else:
        with tarfile.open(kit, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("x"))
    with pytest.raises(
        InputError, match=r"no labels of the validation images \(.*put ILSVRC2012_devkit_t12\.tar\.gz there"
    ):
        open_source(str(tmp_path), "test")


def test_a_damaged_tar_inside_a_tar(tmp_path: Path) -> None:
    make_imagenet(tmp_path)
    path = tmp_path / "ILSVRC2012_img_train.tar"
    intact = path.read_bytes()
    place = intact.index(b"n00000002_0.JPEG")
    path.write_bytes(intact[:place] + b"x" + intact[place + 1 :])
    with pytest.raises(InputError, match=r"n00000002\.tar is damaged, or not a plain tar: the header at byte"):
        open_source(str(path), "train")


def test_a_tar_inside_a_tar_that_is_cut_off_does_not_go_on_with_what_follows(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", {"a.JPEG": png(1)}).read_bytes()
    cut = inner[:1024]  # the header and the content of its only member
    write_tar(tmp_path / "x.tar", {"n00000001.tar": cut, "n00000002.tar": inner, "n00000003.tar": inner})
    with pytest.raises(InputError, match=r"x\.tar: n00000001\.tar is cut off at byte 1536"):
        open_source(str(tmp_path / "x.tar"), "train")


# --- arrays -----------------------------------------------------------------------------------------------------------


def write_arrays(
    path: Path, shape: tuple[int, ...], names: str = "images labels", first: int = 0, **others: Any
) -> Path:
    """Write splits of 4, 2 and 2 images; image n has the value n in all pixels, and the label first + n % 3."""
    images, labels = names.split()
    arrays, start = {}, 0
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        prefix = split[0] if images.startswith("_") and len(images) == 2 else f"{split}_"
        values = np.arange(start, start + count, dtype=np.uint8).reshape(-1, *[1] * len(shape))
        arrays[f"{prefix}{images}"] = np.ones((count, *shape), np.uint8) * values
        arrays[f"{prefix}{labels}"] = (first + np.arange(start, start + count) % 3).astype(np.uint8)[:, np.newaxis]
        start += count
    np.savez_compressed(path, **(arrays | others))
    return path


@pytest.mark.parametrize(
    ("shape", "read_shape"),
    [
        ((5, 4), (5, 4, 1)),
        ((5, 4, 1), (5, 4, 1)),
        ((5, 4, 3), (5, 4, 3)),
        ((3, 5, 4), (5, 4, 3)),
        ((1, 5, 4), (5, 4, 1)),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_arrays_of_medmnist(tmp_path: Path, shape: tuple[int, ...], read_shape: tuple[int, ...], first: int) -> None:
    path = write_arrays(tmp_path / "pathmnist.npz", shape, first=first)
    train, test = (open_source(str(path), split) for split in ("train", "test"))
    assert train.classes == test.classes == [str(first + label) for label in range(3)]
    assert classes_of_values(train) == {n: str(first + n % 3) for n in range(4)}
    assert classes_of_values(test) == {n: str(first + n % 3) for n in (6, 7)}
    assert pixels_of(test, 0).shape == read_shape
    manifest = write_shards(str(path), "test", tmp_path / "out")
    assert manifest.image_shape == [read_shape[2], 5, 4]
    assert not surely_differs(str(path), manifest, "test")
    assert open_shards(tmp_path / "out").manifest.made["source"] == "arrays of images"


def test_arrays_of_keras(tmp_path: Path) -> None:
    arrays = {"x_train": np.zeros((3, 4, 4), np.uint8), "y_train": np.array([2, 0, 9], np.uint8)}
    np.savez(tmp_path / "mnist.npz", **arrays, x_test=np.zeros((1, 4, 4), np.uint8), y_test=np.array([9], np.uint8))
    source = open_source(str(tmp_path / "mnist.npz"), "test")
    assert (source.classes, source.labels.tolist()) == (["0", "2", "9"], [2])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_images": np.zeros((4, 5, 5, 5), np.uint8)}, r"shape \(4, 5, 5, 5\): images are .*, no volumes"),
        (
            {"train_images": np.zeros((4, 5, 5), np.float32)},
            "train_images holds float32 values: write whole numbers 0 to 255",
        ),
        (
            {f"{part}_labels": np.full((n, 14), 2) for part, n in (("train", 4), ("val", 2), ("test", 2))},
            "train_labels: 0 has 2: the share of a label is a number from 0 to 1",
        ),
        ({"train_labels": np.zeros((3, 1), np.uint8)}, "4 images and 3 labels for train"),
        ({"train_labels": np.full((4, 1), 0.5)}, "labels such as 0.5 are measurements"),
        ({"train_labels": np.array([None] * 4)}, "cannot be read as arrays of numpy: Object arrays"),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    write_arrays(tmp_path / "x.npz", (5, 4), **arrays)
    with pytest.raises(InputError, match=message):
        open_source(str(tmp_path / "x.npz"), "train")


def test_damaged_arrays(tmp_path: Path) -> None:
    intact = write_arrays(tmp_path / "x.npz", (5, 4)).read_bytes()
    for content in (b"", b"junk", intact[:100], intact[:-30], intact[:90] + bytes(40) + intact[130:]):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"x\.npz cannot be read as arrays") as raised:
            open_source(str(tmp_path / "x.npz"), "train")
        assert "pickle" not in str(raised.value)
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))  # a single array
    with pytest.raises(InputError, match=r"x\.npz cannot be read as arrays"):
        open_source(str(tmp_path / "x.npz"), "train")
    np.savez(tmp_path / "y.npz", a=np.zeros(3))
    with pytest.raises(InputError, match="has no arrays train_images and train_labels or x_train and y_train, only a"):
        open_source(str(tmp_path / "y.npz"), "train")
