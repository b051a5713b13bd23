import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardstep.configs.errors import InputError
from shardstep.datasets.decode import decode
from shardstep.datasets.framing import Framing
from shardstep.datasets.input_files import IMAGE_EXTENSIONS
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.scan import index_shards
from shardstep.datasets.sources import open_source
from shardstep.datasets.verify import verify_shards
from shardstep.datasets.write import balanced_choice, make_missing_shards, write_shards
from shardstep.launch.cli import run as run_command
from shardstep.launch.shards import main as shards_main
from tests.datasets.test_sources import make_tree, png
from tests.datasets.test_tar import write_tar


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards("synthetic:50", "train", tmp_path / name, samples_per_shard=20)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    write_shards("synthetic:50", "train", tmp_path / "c", samples_per_shard=20, seed=1)
    assert files_of(tmp_path / "c") != files_of(tmp_path / "a")


def test_shards_hold_the_source_shuffled(shards: Path) -> None:
    opened = open_shards(shards / "train")
    assert opened.samples_per_shard == [17, 17, 17, 17, 17, 16]
    source = open_source("synthetic:101", "train")
    reader = StreamReader(opened)
    pixels, labels = reader.read(np.arange(101))
    originals = np.stack([source.read(number) for number in range(101)])  # type: ignore[arg-type]
    places = [int((originals == image).all(axis=(1, 2, 3)).nonzero()[0][0]) for image in pixels.numpy()]
    assert sorted(places) == list(range(101))
    assert places != list(range(101))
    assert labels.tolist() == source.labels[places].tolist()
    assert opened.manifest.samples_per_class == np.bincount(source.labels, minlength=10).tolist()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_any_webdataset_reader_can_read_them(shards: Path) -> None:
    import gc

    import webdataset

    opened = open_shards(shards / "train")
    urls = [str(opened.shard_path(shard)) for shard in range(6)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:06d}" for number in range(101)]
    assert [int(sample["cls"]) for sample in samples] == opened.labels.tolist()
    assert opened.key(57) == "000057"
    assert samples[57]["png"] == StreamReader(opened).read_bytes(57)
    gc.collect()  # webdataset leaves its files to the collector, which warns: here, and not in another test


def test_mean_and_std_are_those_of_the_pixels(shards: Path) -> None:
    opened = open_shards(shards / "train")
    pixels = StreamReader(opened).read(np.arange(101))[0].double() / 255
    assert opened.manifest.mean == pytest.approx(pixels.mean(dim=(0, 1, 2)).tolist(), abs=1e-7)
    assert opened.manifest.std == pytest.approx(pixels.std(dim=(0, 1, 2), correction=0).tolist(), abs=1e-7)


def test_images_keep_their_encoding(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    Image.new("RGB", (4, 3), (200, 10, 10)).save(tmp_path / "tree" / "train" / "a_dog" / "5.jpg")
    manifest = write_shards(str(tmp_path / "tree"), "train", tmp_path / "out")
    assert manifest.encodings == ["jpg", "png"]
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        stored = {tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert (tmp_path / "tree" / "train" / "a_dog" / "5.jpg").read_bytes() in stored
        assert {member.mtime for member in tar} == {0}


def test_grey_images_stay_grey_unless_mixed(tmp_path: Path) -> None:
    for name, modes in (("grey", ("L", "L")), ("mixed", ("L", "RGB"))):
        for number, mode in enumerate(modes):
            path = tmp_path / name / "c" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(100 + 100 * number, mode=mode))
    grey = write_shards(str(tmp_path / "grey"), "train", tmp_path / "out-grey")
    mixed = write_shards(str(tmp_path / "mixed"), "train", tmp_path / "out-mixed")
    assert (grey.image_mode, grey.image_shape) == ("L", [1, 3, 4])
    assert (mixed.image_mode, mixed.image_shape) == ("RGB", [3, 3, 4])
    assert mixed.mean == pytest.approx([150 / 255] * 3, abs=1e-7)  # a grey pixel of 100 and a coloured one of 200


def test_images_of_different_sizes_need_resize(tmp_path: Path) -> None:
    for number, size in enumerate([(8, 6), (5, 9)]):
        path = tmp_path / "tree" / "c" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(77, size=size))
    assert write_shards(str(tmp_path / "tree"), "train", tmp_path / "out").image_shape is None
    opened = open_shards(tmp_path / "out")
    with pytest.raises(InputError, match="differ in size: set data.resize"):
        StreamReader(opened)
    pixels, _ = StreamReader(opened, Framing.covering(4, 4, 2)).read(np.arange(2))
    assert pixels.shape == (2, 4, 4, 3)
    assert (pixels == 77).all()


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        write_shards("synthetic:5", "train", tmp_path / "out")
    assert files_of(tmp_path / "out") == {"precious": b"x"}


def test_classes_of_another_set(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    write_shards(str(tmp_path / "tree"), "train", tmp_path / "train")
    (tmp_path / "tree" / "test" / "a_dog" / "9.png").unlink()
    (tmp_path / "tree" / "test" / "a_dog").rmdir()
    manifest = write_shards(str(tmp_path / "tree"), "test", tmp_path / "test", classes_of=tmp_path / "train")
    assert (manifest.classes, manifest.samples_per_class) == (["a_dog", "b_cat"], [0, 1])
    assert open_shards(tmp_path / "test").labels.tolist() == [1]


@pytest.mark.parametrize("packed", [False, True])
def test_a_class_folder_without_images_is_refused_unless_classes_are_given(tmp_path: Path, packed: bool) -> None:
    source = make_tree(tmp_path / "tree")
    write_shards(str(source), "train", tmp_path / "train")
    (source / "test" / "a_dog" / "9.png").rename(source / "test" / "a_dog" / "9.txt")
    (source / "test" / ".hidden").mkdir()
    if packed:
        with tarfile.open(tmp_path / "tree.tar", "w") as tar:
            tar.add(source, "")
        source = tmp_path / "tree.tar"
    with pytest.raises(InputError, match=r"folders for test without images \(png, .*\): a_dog\. Add some or remove"):
        write_shards(str(source), "test", tmp_path / "test")
    manifest = write_shards(str(source), "test", tmp_path / "test", classes_of=tmp_path / "train")
    assert manifest.samples_per_class == [0, 1]


def test_a_class_that_the_other_set_has_not(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    write_shards(str(tmp_path / "tree"), "train", tmp_path / "train")
    (tmp_path / "tree" / "test" / "b_cat").rename(tmp_path / "tree" / "test" / "c_cow")
    (tmp_path / "tree" / "test" / "d_empty").mkdir()
    with pytest.raises(
        InputError, match="train has no class c_cow, only a_dog, b_cat: remove the images of other classes"
    ):
        write_shards(str(tmp_path / "tree"), "test", tmp_path / "test", classes_of=tmp_path / "train")
    assert not (tmp_path / "test").exists()


def make_tree_with_bad_images(root: Path) -> Path:
    make_tree(root)
    (root / "train" / "a_dog" / "3.png").write_bytes(b"\x89PNG nonsense")
    (root / "train" / "b_cat" / "0.jpg").write_bytes(b"")
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_bad_images_are_named_as_in_the_source_and_leave_nothing_behind(tmp_path: Path, packed: bool) -> None:
    source = make_tree_with_bad_images(tmp_path / "tree")
    if packed:
        with tarfile.open(tmp_path / "tree.tar", "w") as tar:
            tar.add(source, "")
        source = tmp_path / "tree.tar"
    with pytest.raises(InputError) as raised:
        write_shards(str(source), "train", tmp_path / "out")
    headline, *lines = str(raised.value).splitlines()
    assert headline.startswith(f"{source} has images that cannot be used (fix or remove them")
    assert lines == [
        "  - train/a_dog/3.png: not an image that can be decoded",
        "  - train/b_cat/0.jpg: not an image that can be decoded: it is empty",
    ]
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_bad_images_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_tree_with_bad_images(tmp_path / "tree")
    manifest = write_shards(str(source), "train", tmp_path / "out", samples_per_shard=2, bad_images="skip")
    assert (manifest.samples_per_class, manifest.made["left_out"]) == ([2, 1], 2)
    opened = open_shards(tmp_path / "out")
    assert opened.samples_per_shard == [2, 1]
    assert [opened.key(number) for number in range(3)] == ["000000", "000001", "000002"]
    assert (
        "left out: 2 of 5 images\n"
        "  - train/a_dog/3.png: not an image that can be decoded\n"
        "  - train/b_cat/0.jpg: not an image that can be decoded: it is empty\n"
    ) in capsys.readouterr().err


def test_where_all_images_are_bad_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "tree" / "c").mkdir(parents=True)
    (tmp_path / "tree" / "c" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match="has images that cannot be used"):
        write_shards(str(tmp_path / "tree"), "train", tmp_path / "out", bad_images="skip")


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "tree" / "c").mkdir(parents=True)
    Image.fromarray(np.full((3, 4), 60_000, dtype=np.uint16)).save(tmp_path / "tree" / "c" / "0.png")
    manifest = write_shards(str(tmp_path / "tree"), "train", tmp_path / "out")
    assert manifest.mean == [pytest.approx(233 / 255, abs=1e-8)]  # 60,000 / 257 = 233.46


def test_missing_shards_are_made_once(tmp_path: Path) -> None:
    assert make_missing_shards("synthetic:20", "train", tmp_path / "out")
    before = (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns
    assert not make_missing_shards("synthetic:20", "train", tmp_path / "out")
    assert (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns == before


def test_several_processes_make_missing_shards_together(tmp_path: Path) -> None:
    from tests.distributed import run_ranks

    made = run_ranks(3, make_missing_shards, "synthetic:20", "train", tmp_path / "out")
    assert sorted(made) == [False, False, True]
    assert open_shards(tmp_path / "out").manifest.samples == 20


def test_a_killed_writer_leaves_no_data_set(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        from shardstep.datasets import write

        try:
            write.index_shards = lambda *_, **__: os.kill(os.getpid(), 9)  # type: ignore[assignment]
            write.write_shards("synthetic:5", "train", tmp_path / "out")
        finally:
            os._exit(1)  # not reached, unless it failed otherwise
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    with pytest.raises(InputError, match="no shards"):
        open_shards(tmp_path / "out")
    write_shards("synthetic:5", "train", tmp_path / "out")  # what was left does not stand in the way
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# --- tars that others wrote -------------------------------------------------------------------------------------------


def foreign(folder: Path, **shards: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, members in shards.items():
        write_tar(folder / f"{name}.tar", members)
    return folder


def test_foreign_tars_can_be_indexed(tmp_path: Path) -> None:
    folder = foreign(
        tmp_path / "x",
        b={"s/2.png": png(2), "s/2.cls": b"1\n", "s/2.json": b"{}"},
        a={"s/1.cls": b"0", "s/1.png": png(1)},
    )
    manifest = index_shards(folder, {"source": "elsewhere"})
    assert (manifest.classes, manifest.samples) == (["0", "1"], 2)
    opened = open_shards(folder)
    assert [opened.key(0), opened.key(1)] == ["s/1", "s/2"]
    assert int(StreamReader(opened).read(np.array([1]))[0][0, 0, 0, 0]) == 2


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"1.png": png(1)}, "1.png has no label 1.cls"),
        ({"1.cls": b"1"}, "1.cls has no image"),
        (
            {"1.png": png(1), "1.cls": b"cat"},
            "1.cls is not a label (cat): it must be an integer from 0; to read names, add --label cls",
        ),
        ({"1.png": png(1), "1.cls": b"-1"}, "1.cls is not a label (-1): it must be"),
        ({"1.png": png(1), "1.cls": b"7"}, "label 7 is out of range: there are 2 classes"),
        ({"1.png": png(1), "1.cls": b"9" * 5000}, f"1.cls is not a label ({'9' * 30}...)"),
        ({"1.png": b"junk", "1.cls": b"1"}, "1.png: not an image"),
        ({"1.txt": b"junk"}, "no samples"),
        (
            {"1.png": png(1), "1.txt": b"cat"},
            "(--label chooses other files, as txt or json:label): a.tar: 1.png has no",
        ),
        ({"1.png": png(1), "1.jpg": png(1), "1.cls": b"1"}, "1.jpg has the key of 1.png: a sample has one image"),
        ({"1.5x.png": png(1), "1.6x.cls": b"1"}, "1.5x.png has no label 1.5x.cls"),
        ({"1.png": png(1), "1.cls": b"1", "2.5x.cls": b"1"}, "2.5x.cls has no image"),
        ({"1.left.png": png(1), "1.cls": b"1"}, "1.left.png has no label 1.left.cls"),
    ],
)
def test_foreign_tars_with_problems(tmp_path: Path, members: dict[str, bytes], expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        index_shards(foreign(tmp_path / "x", a=members), {}, classes=["a", "b"])


@pytest.mark.parametrize(
    ("members", "keys"),
    [
        (["img_1.5x.png", "img_1.5x.cls", "img_2.5x.png", "img_2.5x.cls"], ["img_1.5x", "img_2.5x"]),
        (["1.5x.png", "1.5x.cls", "1.6x.cls", "1.6x.png", "1.png", "1.cls"], ["1.5x", "1.6x", "1"]),
        (["a.b/1.png", "a.b/1.cls", "a.b/2.0.JPG", "a.b/2.0.CLS"], ["a.b/1", "a.b/2.0"]),
        (["./v1.0.png", "./v1.0.cls"], ["./v1.0"]),
        (["1.v2.final.png", "1.v2.final.cls"], ["1.v2.final"]),
        (["1.png", "1.cls", "1.depth.png", "1.json", "1.coarse.cls"], ["1"]),
        (["1.5.png", "1.5.cls", "1.5.mask.png"], ["1.5"]),
        (["1.png", "1.cls", "._1.png", "._1.cls", "__MACOSX/._1.png", ".hidden/2.png", ".DS_Store"], ["1"]),
    ],
)
def test_every_sample_of_a_foreign_tar_is_indexed(tmp_path: Path, members: list[str], keys: list[str]) -> None:
    content = {name: b"0" if name.lower().endswith("cls") else png(1) for name in members}
    folder = foreign(tmp_path / "x", a=content)
    assert index_shards(folder, {}).samples == len(keys)
    opened = open_shards(folder)
    assert [opened.key(number) for number in range(len(keys))] == keys
    assert verify_shards(folder) == []


def test_what_foreign_tars_hold_beside_samples_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = {"1.png": png(1), "1.cls": b"0", "1.json": b"{}", "1.depth.png": png(1), "._1.png": b""}
    folder = foreign(tmp_path / "x", a=sample, b={"2.png": png(1), "2.cls": b"0", "2.json": b"{}"})
    (folder / "c.gz").write_bytes(b"")
    (folder / "._a.tar").write_bytes(b"")
    (folder / "more").mkdir()
    assert index_shards(folder, {}).samples == 2
    assert capsys.readouterr().err == (
        f"left out of {folder}: 2 hidden files (._a.tar, ...), 2 .json files (a.tar: 1.json, ...), 1 .gz file (c.gz), "
        "1 folder (more), 1 extra image (a.tar: 1.depth.png); used are samples of <key>.cls beside "
        f"<key>.{'|'.join(IMAGE_EXTENSIONS)} in .tar files\n"
    )
    index_shards(folder, {})  # the manifest and index of before are no files to tell about
    assert "2 hidden files" in capsys.readouterr().err
    assert verify_shards(folder) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("name", ["2.png", "2.cls"])
def test_samples_that_are_links_are_refused(tmp_path: Path, kind: bytes, name: str) -> None:
    folder = foreign(tmp_path / "x", a={"1.png": png(1), "1.cls": b"0"})
    with tarfile.open(folder / "a.tar", "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "1.png"
        tar.addfile(info)
    with pytest.raises(
        InputError, match=rf"a\.tar: {name} is a (hard link|link|special file): pack the files themselves"
    ):
        index_shards(folder, {})


@pytest.mark.parametrize("kind", ["FIFO", "broken link", "link to a folder"])
def test_tars_that_are_no_files(tmp_path: Path, kind: str) -> None:
    folder = foreign(tmp_path / "x", a={"1.png": png(1), "1.cls": b"0"})
    if kind == "FIFO":
        os.mkfifo(folder / "b.tar")
    else:
        (folder / "b.tar").symlink_to("nowhere" if kind == "broken link" else tmp_path)
    if kind == "link to a folder":
        assert index_shards(folder, {}).samples == 1  # counted
        return
    with pytest.raises(
        InputError, match=r"cannot be indexed: .*b\.tar cannot be read: (not a regular|it does not exist)"
    ):
        index_shards(folder, {})


def labelled(*labels: int) -> dict[str, bytes]:
    """Members of a tar with one sample for each label."""
    images = {f"{number}.png": png(1) for number in range(len(labels))}
    return images | {f"{number}.cls": str(label).encode() for number, label in enumerate(labels)}


def test_labels_that_count_from_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "x", a=labelled(1, 2, 3, 3))
    expected = "the labels are 1 to 3, none is 0. If they count from 1, add --first-label 1"
    assert run_command(shards_main, ["index", str(folder)]) == 2
    assert expected in capsys.readouterr().err
    assert run_command(shards_main, ["index", str(folder), "--classes", "a,b,c"]) == 2
    assert (
        "label 3 is out of range: there are 3 classes; if labels count from 1, add --first" in capsys.readouterr().err
    )
    assert shards_main(["index", str(folder), "--first-label", "1"]) == 0
    opened = open_shards(folder)
    assert (opened.manifest.classes, opened.manifest.samples_per_class) == (["1", "2", "3"], [1, 1, 2])
    assert opened.labels.tolist() == [0, 1, 2, 2]
    assert shards_main(["index", str(folder), "--force", "--classes", "a,b,c"]) == 0  # counts from 1, as before
    assert open_shards(folder).manifest.samples_per_class == [1, 1, 2]
    damage = folder / "a.tar"
    damage.write_bytes(damage.read_bytes().replace(b"1" + bytes(511), b"2" + bytes(511), 1))
    assert "the label of sample 0" in "".join(verify_shards(folder))
    assert len(verify_shards(folder)) == 2
    assert run_command(shards_main, ["index", str(folder), "--force", "--first-label", "3"]) == 2
    assert (
        "1.cls is not a label (2): it must be an integer from 3; give another --first-label" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        ((0, 2, 2), [], "1 class without images: 1"),
        ((1, 2, 2), ["--classes", "a,b,c"], "1 class without images: a"),
        ((2, 2, 2), ["--first-label", "2"], ""),
        ((0, 1, 2), [], ""),
    ],
)
def test_classes_without_samples_are_told(
    tmp_path: Path, labels: tuple[int, ...], options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(tmp_path / "x", a=labelled(*labels))
    assert shards_main(["index", str(folder), *options]) == 0
    assert capsys.readouterr().err == (f"{folder}: {expected}\n" if expected else "")


def test_all_problems_are_counted_though_not_all_are_named(tmp_path: Path) -> None:
    members = {
        f"{number}.{kind}": png(1) if kind == "png" else b"cat" for number in range(50) for kind in ("png", "cls")
    }
    with pytest.raises(InputError) as raised:
        index_shards(foreign(tmp_path / "x", a=members), {})
    headline, *lines = str(raised.value).splitlines()
    assert headline.endswith("cannot be indexed: 50 problems")
    assert len(lines) == 21
    assert lines[-1] == "  - and 30 more"


@pytest.mark.parametrize(
    ("former", "expected"),
    [(["cat", "dog", "cow"], ["cat", "dog", "cow"]), (["cat"], ["0", "1"]), (None, ["0", "1"])],
)
def test_former_names_are_kept_if_they_reach(tmp_path: Path, former: list[str] | None, expected: list[str]) -> None:
    members = {"1.png": png(1), "1.cls": b"1", "2.png": png(2), "2.cls": b"0"}
    assert index_shards(foreign(tmp_path / "x", a=members), {}, former_classes=former).classes == expected


def test_a_key_in_two_shards(tmp_path: Path) -> None:
    sample = {"1.png": png(1), "1.cls": b"0"}
    with pytest.raises(InputError, match=r"the key 1 is in a\.tar and in b\.tar"):
        index_shards(foreign(tmp_path / "x", a=sample, b=sample), {})


def test_transparency_is_dropped(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 3), (10, 20, 30, 40)).save(buffer, "png")
    folder = foreign(tmp_path / "x", a={"1.png": buffer.getvalue(), "1.cls": b"0"})
    assert index_shards(folder, {}).image_mode == "RGB"
    assert decode(buffer.getvalue(), "RGB")[0, 0].tolist() == [10, 20, 30]


def test_a_huge_label_without_class_names(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="the largest label is 3000000, which would mean 3,000,001 classes for 1 sample",
    ):
        index_shards(foreign(tmp_path / "x", a={"1.png": png(1), "1.cls": b"3000000"}), {})


def test_long_keys_are_complete(tmp_path: Path) -> None:
    import tarfile as tarfiles

    names = [f"{'x' * 90}/{'y' * 40}{number}" for number in range(2)]
    members = {f"{name}.{kind}": png(1) if kind == "png" else b"0" for name in names for kind in ("png", "cls")}
    for tar_format in (tarfiles.PAX_FORMAT, tarfiles.GNU_FORMAT, tarfiles.USTAR_FORMAT):
        folder = tmp_path / str(tar_format)
        folder.mkdir()
        write_tar(folder / "a.tar", members, tar_format)
        index_shards(folder, {})
        opened = open_shards(folder)
        assert [opened.key(0), opened.key(1)] == names


def test_a_source_without_splits_is_not_used_for_both(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    with pytest.raises(InputError, match="both sets would hold the same images"):
        make_missing_shards(str(tmp_path / "tree" / "train"), "test", tmp_path / "out")


def test_a_choice_is_balanced_seeded_and_nested() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 30)
    chosen = balanced_choice(labels, 20, seed=0)
    # turns go round the classes: 3 of each, then class 1 is used up: 9 + 11 of two classes
    assert np.bincount(labels[chosen]).tolist() == [9, 3, 8]
    assert len(set(chosen.tolist())) == 20
    assert np.array_equal(chosen, balanced_choice(labels, 20, seed=0))
    assert not np.array_equal(chosen, balanced_choice(labels, 20, seed=1))
    assert set(balanced_choice(labels, 10, seed=0)) < set(chosen)
    assert np.array_equal(balanced_choice(labels, 83, seed=0), np.arange(83))


def test_a_limit_writes_so_many_of_the_same_images(tmp_path: Path) -> None:
    manifest = write_shards("synthetic:200", "train", tmp_path / "few", samples_per_shard=30, limit=70)
    assert (manifest.samples, manifest.made["limit"]) == (70, 70)
    assert set(manifest.samples_per_class) == {7}
    write_shards("synthetic:200", "train", tmp_path / "all", samples_per_shard=30)
    few, every = (open_shards(tmp_path / name) for name in ("few", "all"))
    assert set(few.index["crc32"].tolist()) < set(every.index["crc32"].tolist())
    for limit, expected in ((0, "choose at least 1"), (201, "but there are 200: omit it")):
        with pytest.raises(InputError, match=expected):
            write_shards("synthetic:200", "train", tmp_path / "none", limit=limit)


def test_a_file_in_the_place_of_the_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match=r"out is a file; nothing was written. Give a folder"):
        write_shards("synthetic:20", "train", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_refused_is_counted_by_kind_before_anything_is_written(
    tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardstep.datasets import write

    make_tree(tmp_path / "tree")
    bad = {"0.jpg": b"", "1.jpg": b"<html>", "2.jpg": b"\0\0\0\x18ftypheic" + bytes(40), "3.jpg": b"\xff\xd8\xff cut"}
    for name, data in bad.items():
        (tmp_path / "tree" / "train" / "b_cat" / f"bad{name}").write_bytes(data)
    (tmp_path / "tree" / "train" / "b_cat" / "bad4.jpg").symlink_to("nowhere")
    source = tmp_path / "tree"
    if packed:
        source = tmp_path / "tree.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(tmp_path / "tree", "")
    few = r"; 5 of 8 images, 3 not an image that can be decoded, 1 not an image that can be decoded: it is empty, 1 cannot be"
    with pytest.raises(InputError, match=few):
        write_shards(str(source), "train", tmp_path / "out")
    # Of many images, the first bytes are looked at first: they do not show that a JPEG is cut off
    monkeypatch.setattr(write, "_QUICKLY_DECODED", 5)
    monkeypatch.setattr(write, "_write_tars", None)
    with pytest.raises(InputError, match="; 4 of 8 images, 2 not an image that can be decoded, 1 not an image"):
        write_shards(str(source), "train", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_writing_stops_when_many_images_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardstep.datasets import write

    folder = tmp_path / "tree" / "train" / "c"
    folder.mkdir(parents=True)
    for number in range(300):
        (folder / f"{number}.jpg").write_bytes(b"\xff\xd8\xff cut")
    monkeypatch.setattr(write, "_QUICKLY_DECODED", 50)
    with pytest.raises(InputError, match="; 50 of the first 50 images, 50 not an image that can be decoded"):
        write_shards(str(tmp_path / "tree"), "train", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["tree"]
