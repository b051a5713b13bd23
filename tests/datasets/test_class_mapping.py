"""The classes of a data set as those of a model: by name, or by number where one of them has no names."""

import re
from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
from shardstep.datasets.class_mapping import map_classes
from shardstep.datasets.manifest import ShardFolder, open_shards
from shardstep.launch.shards import main as shards_main
from tests.datasets.test_sources import png
from tests.datasets.test_tar import write_tar


def shards_of(folder: Path, classes: list[str] | None, labels: list[int]) -> ShardFolder:
    """Shards of a sample for each label; without class names, these are numbers."""
    folder.mkdir()
    members = {}
    for number, label in enumerate(labels):
        members |= {f"{number:03d}.png": png(number), f"{number:03d}.cls": str(label).encode()}
    write_tar(folder / "a.tar", members)
    assert shards_main(["index", str(folder), *(["--classes", ",".join(classes)] if classes else [])]) == 0
    return open_shards(folder)


@pytest.mark.parametrize(
    ("known", "classes", "labels", "expected", "told"),
    [
        (["a", "b"], ["a", "b"], [0, 1], [0, 1], None),
        (["a", "b"], ["b", "a"], [0, 1], [1, 0], "x has other classes than the model: classes are matched by name"),
        (["1", "2", "10"], ["1", "10", "2"], [0, 1, 2], [0, 2, 1], "classes are matched by name"),
        (["a", "b", "c"], ["c"], [0, 0], [2, 2], "only the model has a, b"),
        (["a", "b", "c"], ["c", "a"], [0, 1], [2, 0], "only the model has b"),
        (["a", "b"], ["a", "b", "c"], [0, 1], [0, 1], "without images: c"),
        (["a", "b"], ["c", "b", "a"], [1, 2], [1, 0], "without images: c"),
        (["a", "b"], ["c", "b"], [1, 1], [1, 1], "only the model has a; without images: c"),
        (["0", "1", "2"], ["2", "1"], [0, 1], [2, 1], "only the model has 0"),
        (["cat", "dog"], None, [0, 1], [0, 1], "labels count as the same in both: 0 as cat, 1 as dog"),
        (["cat", "dog", "cow", "pig"], None, [0, 1], [0, 1], "0 as cat, 1 as dog; only the model has cow, pig"),
        (["cat", "dog"], ["1", "2"], [0, 1], [0, 1], "labels count as the same in both: 1 as cat, 2 as dog"),
        (["0", "1", "2"], ["cat", "dog", "cow"], [2, 0], [2, 0], "numbers only, so labels count as the same in both"),
        (["0", "1"], ["cat", "dog", "cow"], [1, 0], [1, 0], "without images: cow"),
    ],
)
def test_labels_become_those_of_the_model(
    tmp_path: Path,
    known: list[str],
    classes: list[str] | None,
    labels: list[int],
    expected: list[int],
    told: str | None,
) -> None:
    shards = shards_of(tmp_path / "x", classes, labels)
    mapped, note = map_classes(shards, known, "x")
    assert (mapped.labels.tolist(), mapped.manifest.classes) == (expected, known)
    assert mapped.manifest.samples_per_class == [expected.count(label) for label in range(len(known))]
    assert mapped.manifest.fingerprint == shards.manifest.fingerprint
    assert (note is None) == (told is None)
    assert told is None or (note is not None and told in note)


@pytest.mark.parametrize(
    ("known", "classes", "labels", "message"),
    [
        (
            ["a", "b"],
            ["a", "c"],
            [0, 1, 1],
            "x has images of classes that the model does not know: c (2 images). It knows a, b",
        ),
        (["a", "b"], ["a", "c", "d"], [0, 1], "does not know: c (1 image). It"),
        (["a", "b"], ["c", "d"], [0, 1], "does not know: c (1 image), d (1 image)"),
        (["a", "b"], ["A", "B"], [0, 1], "does not know: A (1 image), B (1 image)"),
        (["0", "1"], ["1", "2"], [0, 1], "does not know: 2 (1 image)"),
        (["1", "2"], ["0", "1"], [0, 1], "does not know: 0 (1 image)"),
        (["cat", "dog"], ["0", "1", "2"], [0, 1, 2], "does not know: 2 (1 image)"),
        (["cat", "dog"], ["3", "7"], [0, 1], "does not know: 3 (1 image), 7 (1 image)"),  # ids, not labels in a row
        (["cat", "1"], ["0", "1"], [0, 1], "does not know: 0 (1 image)"),
        (["a\nb"], ["\x1b[31m"], [0], "does not know: \\x1b[31m (1 image). It knows a\\nb"),
    ],
)
def test_images_of_unknown_classes_are_refused(
    tmp_path: Path, known: list[str], classes: list[str], labels: list[int], message: str
) -> None:
    shards = shards_of(tmp_path / "x", classes, labels)
    with pytest.raises(InputError, match=re.escape(message)):
        map_classes(shards, known, "x")
