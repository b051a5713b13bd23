"""Which files, folders and links of an input count: the same in a folder and in a tar of it."""

import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
from shardstep.datasets.input_files import IMAGE_EXTENSIONS, FolderTree, LeftOut, find_images, is_hidden, split_name
from shardstep.datasets.sources import open_source
from shardstep.datasets.sources.class_folders import split_folders
from shardstep.datasets.sources.source import Source
from shardstep.datasets.write import make_missing_shards, write_shards
from shardstep.launch.shards import main as shards_main
from tests.datasets.test_sources import png
from tests.datasets.test_tar import write_tar

FIFO = "FIFO"  # instead of a link's target
BOTH = pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])


def make_input(folder: Path, files: list[str], packed: bool) -> Path:
    """Make files, or a tar of them. "a/" is an empty folder, "a -> b" a symbolic link, "a => b" a hard link; PNGs differ."""
    root = folder / "input"
    root.mkdir()
    for number, line in enumerate(files):
        name, arrow, target = line.partition(" -> ") if " -> " in line else line.partition(" => ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif target == FIFO:
            os.mkfifo(path)
        elif arrow == " -> ":
            path.symlink_to(target)
        elif arrow == " => ":
            os.link(root / target, path)
        else:
            path.write_bytes(png(number))
    if not packed:
        return root
    with tarfile.open(folder / "input.tar", "w") as tar:
        tar.add(root, "")
    return folder / "input.tar"


def names_of(source: Source) -> list[str]:
    return [source.name(number) for number in range(len(source.labels))]


@BOTH
@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (["a/.ipynb_checkpoints/1.png", ".ipynb_checkpoints/1.png"], "2 hidden folders (.ipynb_checkpoints, ...)"),
        (["a/._1.png", ".DS_Store", "b/.1.png"], "3 hidden files (.DS_Store, ...)"),
        (["__MACOSX/a/1.png"], "1 hidden folder (__MACOSX)"),
        (["a/__MACOSX/._1.png", "@eaDir/a.jpg/S.jpg", "$RECYCLE.BIN/1.png"], "3 hidden folders ($RECYCLE.BIN, ...)"),
        (["a/Thumbs.db", "b/desktop.ini"], "2 hidden files (a/Thumbs.db, ...)"),
        ([".Trash-1000/files/a/1.png", ".git/x.png"], "2 hidden folders (.Trash-1000, ...)"),
        ([".hidden -> a"], "1 hidden folder (.hidden)"),
        (["a/notes.TXT", "README"], "1 other file (README), 1 .txt file (a/notes.TXT)"),
        (["a/1.png~", "a/2.png.", "b/1.png.part"], "1 .png~ file (a/1.png~), 1 other file (a/2.png.), 1 .part file"),
        (["a/up -> ..", "b/self -> ."], "2 circular links (a/up, ...)"),
        (["a/gone -> nowhere"], "1 broken link (a/gone)"),
        (["a/round -> round"], "1 broken link (a/round)"),
        (["a/pipe -> FIFO"], "1 special file (a/pipe)"),
    ],
)
def test_what_is_left_out_is_counted(tmp_path: Path, others: list[str], expected: str, packed: bool) -> None:
    path = make_input(tmp_path, ["a/1.png", "b/1.png", *others], packed)
    source = open_source(str(path), "train")
    assert (source.classes, names_of(source)) == (["a", "b"], ["a/1.png", "b/1.png"])
    (line,) = source.notes
    assert line.startswith(f"left out of {path}: {expected}")
    assert "; used are files that end in png, jpg" in line


@BOTH
@pytest.mark.parametrize(
    ("files", "classes", "images"),
    [
        (["a/IMG.PNG", "a/2.Png", "b/3.png"], ["a", "b"], ["a/2.Png", "a/IMG.PNG", "b/3.png"]),
        (["a/x.png/1.png", "b/2.png"], ["a", "b"], ["a/x.png/1.png", "b/2.png"]),  # a folder called x.png
        (["a/images/1.png", "b/images/2.png"], ["a", "b"], ["a/images/1.png", "b/images/2.png"]),
        (["a/1.v2.png", "b.c/2.png"], ["a", "b.c"], ["a/1.v2.png", "b.c/2.png"]),
        (["a/1.png", "b/2.png -> ../a/1.png"], ["a", "b"], ["a/1.png", "b/2.png"]),
        (["a/1.png", "b -> a"], ["a", "b"], ["a/1.png", "b/1.png"]),
        (["a/1.png", "b/2.png => a/1.png"], ["a", "b"], ["a/1.png", "b/2.png"]),
        (["train/a/1.png", "train/b -> ../pool/c", "pool/c/2.png"], ["a", "b"], ["train/a/1.png", "train/b/2.png"]),
        (
            ["a/1.png", "b/l -> m", "b/m -> ../.store", ".store/2.png"],
            ["a", "b"],
            ["a/1.png", "b/l/2.png", "b/m/2.png"],
        ),
    ],
)
def test_what_is_kept(tmp_path: Path, files: list[str], classes: list[str], images: list[str], packed: bool) -> None:
    path = make_input(tmp_path, files, packed)
    source = open_source(str(path), "train")
    assert (source.classes, names_of(source)) == (classes, images)
    assert all(source.read(number).startswith(b"\x89PNG") for number in range(len(images)))  # type: ignore[union-attr]


@BOTH
@pytest.mark.parametrize("link", ["b -> a", "b/1.png -> ../a/1.png", "b/1.png => a/1.png", "a/again -> ../b"])
def test_images_that_links_multiply_are_told(tmp_path: Path, link: str, packed: bool) -> None:
    extra = ["b/2.png"] if link.startswith("a") else []
    source = open_source(str(make_input(tmp_path, ["a/1.png", *extra, link], packed)), "train")
    assert len(source.labels) == 2 + len(extra)
    assert any("1 image found more than once, by links, and used each time: " in note for note in source.notes)


@BOTH
@pytest.mark.parametrize(
    ("bad", "on_disk", "in_a_tar"),
    [
        ("2.png -> FIFO", "not a regular file", "not a regular file"),
        ("2.png -> no.png", "link to no.png: No such file or directory", "a link to no.png, which is not in the tar"),
        ("2.png -> 2.png", "link to 2.png: Too many levels of symbolic links", "a link to 2.png, in a circle"),
        ("2.png -> 1.png/3", "link to 1.png/3: Not a directory", "a link to 1.png/3, which is not in the tar"),
        (
            "2.png -> /proc/self/mem",
            "link to /proc/self/mem: Input/output error",
            "a link to /proc/self/mem, outside the tar",
        ),
        ("2.png -> ../../../../../../no", "link to ../../../../../../no: No such", "../../no, outside the tar"),
    ],
)
def test_images_that_cannot_be_read_are_bad_images(
    tmp_path: Path, bad: str, on_disk: str, in_a_tar: str, packed: bool
) -> None:
    path = make_input(tmp_path, ["a/1.png", "b/1.png", f"a/{bad}"], packed)
    with pytest.raises(InputError, match="images that cannot be used.* a/2.png: cannot be read") as raised:
        write_shards(str(path), "train", tmp_path / "out")
    assert (in_a_tar if packed else on_disk) in str(raised.value)
    manifest = write_shards(str(path), "train", tmp_path / "out", bad_images="skip")
    assert (manifest.samples_per_class, manifest.made["left_out"]) == ([1, 1], 1)


@BOTH
@pytest.mark.parametrize("empty", ["c/", "c/.hidden.png", "c/notes.txt", "c/d/", "c -> nowhere", "c -> c"])
def test_a_class_without_images_is_refused(tmp_path: Path, empty: str, packed: bool) -> None:
    path = make_input(tmp_path, ["a/1.png", "b/1.png", empty], packed)
    with pytest.raises(
        InputError,
        match=r"has folders for train without images \(png, .*\): c( \(a broken link\))?\. Add some or remove",
    ):
        write_shards(str(path), "train", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["write", "train"])
def test_commands_print_what_is_left_out(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_input(tmp_path, ["train/a/1.png", "train/a/.ipynb_checkpoints/1.png", "train/a/x.txt"], packed=False)
    if command == "write":
        shards_main(["write", "--source", str(source), "--out", str(tmp_path / "out")])
    else:
        make_missing_shards(str(source), "train", tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert lines == [
        f"left out of {source}: 1 hidden folder (train/a/.ipynb_checkpoints), 1 .txt file (train/a/x.txt); "
        f"used are files that end in {', '.join(IMAGE_EXTENSIONS)}"
    ]


# --- folders that are no classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "train", "Train", "TRAIN", "training", "Training", "train_set", "training_set", "Training Set", "trainset",
        "TrainingSet", "train-data", "traindata", "train_images", "seg_train", "train2017", "img_train", "train.images",
    ],
)  # fmt: skip
def test_names_of_splits(name: str) -> None:
    assert split_folders([name]) == {name: "train"}
    for word, split in (("test", "test"), ("testing", "test"), ("val", "val"), ("Validation", "val"), ("VALID", "val")):
        other = name.lower().replace("training", "train").replace("train", word)
        assert split_folders([other]) == {other: split}


@pytest.mark.parametrize(
    "names",
    [
        ["bullet_train", "electric_locomotive", "test_tube"],
        ["strain", "trains", "contest", "retraining", "valley", "values", "interval", "device", "trainer", "attest"],
        ["set", "data", "images", "seg", "", "_", "7"],
        ["bullet_train", "crash_test"],
    ],
)
def test_names_of_classes(names: list[str]) -> None:
    assert split_folders(names) == {}


def test_names_in_pairs_are_splits() -> None:
    pair = ["asl_alphabet_train", "asl_alphabet_test", "other", "my-val"]
    assert split_folders(pair) == {"asl_alphabet_train": "train", "asl_alphabet_test": "test"}


@BOTH
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "TEST"), ("training", "testing"), ("training_set", "test_set"), ("seg_train", "seg_test"),
        ("Training Data", "Testing Data"), ("asl_alphabet_train", "asl_alphabet_test"),
        ("seg_train/seg_train", "seg_test/seg_test"), ("train/Train", "test/Test"), ("wrapper/train", "wrapper/test"),
        ("data/images/train", "data/images/test"), ("train/images", "test/Images"),
    ],
)  # fmt: skip
def test_splits_by_other_names_are_used(tmp_path: Path, train: str, test: str, packed: bool) -> None:
    path = make_input(tmp_path, [f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/a/2.png", f"{test}/b/2.png"], packed)
    for split, folder, number in (("train", train, 1), ("test", test, 2)):
        source = open_source(str(path), split)
        assert (source.classes, source.has_splits, source.notes) == (["a", "b"], True, [])
        assert names_of(source) == [f"{folder}/a/{number}.png", f"{folder}/b/{number}.png"]


@BOTH
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/a/1.png", "val/a/1.png"], "has no test/, only train, val: give the folder itself"),
        (["Training/a/1.png", "b/1.png"], "has no test/, only Training: give the folder itself"),
        (["a/1.png", "b/1.png", "valid/1.png"], "has no test/, only valid: .* If it is a class, move all"),
        (["testing/a/1.png", "test_set/a/1.png"], "has several folders for test: test_set, testing"),
        (["train/1.png", "test/1.png"], "test holds 1 image outside class folders, such as 1.png"),
        (["Train/1.png", "TEST/1.png"], "TEST holds 1 image outside class folders, such as 1.png"),
        (["a/train/1.png", "a/test/1.png", "b/train/1.png"], "has splits inside class folders .a/test, a/train."),
        (
            ["a/Training/x/1.png", "a/Testing/x/1.png", "b/Training/x/1.png"],
            "splits inside class folders .a/Testing, a/Tr",
        ),
        (["a/1.png", "b/validation/1.png"], "has splits inside class folders .b/validation."),
        (["images/1.png", "val_annotations.txt"], "has no class folders: all images are in images/. Sort them"),
        (["test/images/1.png", "train/n01/images/1.png"], "test has no class folders: all images are in images/"),
        (["JPEGImages/1.png"], "has no class folders: all images are in JPEGImages/"),
        (["images/1.png", "masks/1.png"], "has no class folders: all images are in images/, masks/"),
        (["1.png", "2.png"], "holds 2 images outside class folders, such as 1.png"),
        (["notes.txt", ".a/1.png"], "no images in .*; left out of .*: 1 hidden folder .*, 1 .txt file"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, files: list[str], message: str, packed: bool) -> None:
    with pytest.raises(InputError, match=message):
        open_source(str(make_input(tmp_path, files, packed)), "test")


@BOTH
@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["tr/cat/1.png", "tr/dog/2.png", "te/cat/3.png", "te/dog/4.png"], "te, tr"),
        (["fold1/0/1.png", "fold1/1/2.png", "fold2/0/3.png", "fold2/1/4.png"], "fold1, fold2"),
        (["s1/a/1.png", "s1/b/2.png", "s2/a/3.png", "s2/b/4.png", "more/1.png"], "s1, s2"),
        (["w/s1/a/1.png", "w/s1/b/2.png", "w/s2/a/3.png", "w/s2/b/4.png"], "s1, s2"),
        (["f1/images/a/1.png", "f1/images/b/2.png", "f2/images/a/3.png", "f2/images/b/4.png"], "f1, f2"),
        (["train/f1/a/1.png", "train/f1/b/2.png", "train/f2/a/3.png", "train/f2/b/4.png"], "f1, f2"),
        (["art/a/1.png", "art/b/2.png", "clip/a/3.png", "clip/b/4.png", "clip/c/5.png"], "art, clip"),
        (["cat/images/1.png", "dog/images/2.png"], None),
        (["cat/1.png", "dog/2.png"], None),
        (["cat/front/1.png", "dog/front/2.png"], None),
        (["cat/persian/1.png", "cat/manx/2.png", "dog/poodle/3.png", "dog/boxer/4.png"], None),
        (["a/x/1.png", "a/y/2.png", "b/x/3.png", "b/y/4.png", "c/5.png", "d/6.png", "e/7.png"], None),  # two of five
    ],
)
def test_classes_that_may_be_splits_are_told(tmp_path: Path, files: list[str], told: str | None, packed: bool) -> None:
    notes = open_source(str(make_input(tmp_path, files, packed)), "train").notes
    found = [note for note in notes if "hold folders of the same names" in note]
    assert len(found) == (told is not None)
    assert told is None or f"the classes {told} hold folders of the same names. If they are splits or folds" in found[0]


@BOTH
@pytest.mark.parametrize(
    ("name", "split", "files", "is_told"),
    [
        ("images", "train", ["a/1.png", "b/2.png"], True),
        ("images", "test", ["a/1.png", "b/2.png"], True),
        ("train", "test", ["a/1.png", "b/2.png"], True),
        ("my_training_images", "train", ["a/1.png", "b/2.png"], False),
        ("test", "test", ["a/1.png", "b/2.png"], False),
        ("images", "train", ["train/a/1.png", "train/b/2.png"], False),
    ],
)
def test_a_source_that_is_used_whole_is_told(
    tmp_path: Path,
    name: str,
    split: str,
    files: list[str],
    is_told: bool,
    packed: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_input(tmp_path, files, packed)
    path = path.rename(path.with_name(name + path.suffix))
    write_shards(str(path), split, tmp_path / "out")
    line = (
        f"{path} does not say which images are for {split}: all of them are taken. Give each split a source of its own"
    )
    assert (line in capsys.readouterr().err) == is_told


@BOTH
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_may_be_called_train(tmp_path: Path, split: str, packed: bool) -> None:
    path = make_input(tmp_path, ["bus/1.png", "car/1.png", "train/1.png"], packed)
    assert open_source(str(path), split).classes == ["bus", "car", "train"]


@BOTH
def test_classes_below_splits_may_have_any_name(tmp_path: Path, packed: bool) -> None:
    classes = ["bus", "images", "test", "train", "val"]
    files = [f"train/{name}/1.png" for name in classes]
    path = make_input(tmp_path, [*files, "train/bus/test/2.png", "train/bus/val/3.png"], packed)
    assert open_source(str(path), "train").classes == classes


@BOTH
def test_what_lies_beside_a_split_is_counted(tmp_path: Path, packed: bool) -> None:
    splits = ["train/a/1.png", "train/b/1.png", "test/a/1.png", "val/a/1.png"]
    files = [*splits, "Training/1.png", "labels.csv", "lost.png", ".x"]
    path = make_input(tmp_path, files, packed)
    validation, line = open_source(str(path), "train").notes
    assert validation.startswith(f"{path / 'val'} is not used")
    assert "1 hidden file (.x), 1 folder (Training), 1 .csv file (labels.csv), 1 loose image (lost.png);" in line


@BOTH
def test_a_folder_that_is_passed_through_is_told(tmp_path: Path, packed: bool) -> None:
    path = make_input(tmp_path, ["pets/a/1.png", "pets/b/1.png", "README"], packed)
    source = open_source(str(path), "train")
    assert source.classes == ["a", "b"]
    assert source.notes[0] == f"{path}: the classes are the folders in pets/, the only folder"
    assert "1 other file (README)" in source.notes[1]


# --- tars only --------------------------------------------------------------------------------------------------------


def test_names_in_a_tar_are_those_it_would_unpack(tmp_path: Path) -> None:
    members = {"/data/a/1.png": png(1), "./data/a/2.png": png(2), "../data/b/3.png": png(3), "data//b/./4.png": png(4)}
    source = open_source(str(write_tar(tmp_path / "x.tar", members)), "train")
    assert (source.classes, source.labels.tolist()) == (["a", "b"], [0, 0, 1, 1])


def test_a_later_member_replaces_an_earlier_one(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in (1, 2):
            (tmp_path / "1.png").write_bytes(png(number))
            tar.add(tmp_path / "1.png", "a/1.png")
        tar.add(tmp_path / "1.png", "b/1.png")
    source = open_source(str(tmp_path / "x.tar"), "train")
    assert [source.read(number) for number in range(2)] == [png(2), png(2)]
    assert source.notes == [f"{tmp_path / 'x.tar'}: 1 member is in the tar again; the last one counts: a/1.png"]


@pytest.mark.parametrize("names", [["a", "a/1.png"], ["a/1.png", "a"], ["a/1.png", "a/1.png/2.png"]])
def test_a_member_that_is_file_and_folder_is_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(InputError, match="no folder|both a folder and a file"):
        open_source(str(write_tar(tmp_path / "x.tar", {name: png(1) for name in names})), "train")


def test_images_that_are_named_like_batches_are_no_cifar10(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a/test_batch_1.png": png(1), "b/data_batch_1.png": png(2)})
    assert open_source(str(path), "train").classes == ["a", "b"]


# --- folders only -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give up only the right to read everything")
def test_folders_and_files_without_permission(tmp_path: Path) -> None:
    root = make_input(tmp_path, ["a/1.png", "b/1.png", "c/1.png"], packed=False)
    (root / "a" / "1.png").chmod(0)
    command = f"from shardstep.launch.shards import main; main(['write', '--source', {str(root)!r}, '--out', 'out'])"
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c", command]
    result = subprocess.run(drop, cwd=tmp_path, capture_output=True, text=True)
    assert "a/1.png: cannot be read (Permission denied)" in result.stderr
    (root / "b").chmod(0)
    result = subprocess.run(drop, cwd=tmp_path, capture_output=True, text=True)
    assert f"InputError: the folder {root / 'b'} cannot be listed (Permission denied)" in result.stderr


def test_sockets_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_input(tmp_path, ["a/1.png"], packed=False)
    monkeypatch.chdir(root)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a/agent")
        assert find_images(FolderTree(root)).left_out.counts == {"special file": 1}


def test_names_that_are_hidden() -> None:
    bins = ("#recycle", "@Recycle/a.png", "a/#snapshot/b.png", "~snapshot", "RECYCLER", "@Recently-Snapshot")
    for name in (".x", "a/.x/b.png", "__MACOSX/a.png", "a/thumbs.db", "lost+found", *bins):
        assert is_hidden(name), name
    for name in ("x", "./a", "../a", "a.b/c", "x__MACOSX", ""):
        assert not is_hidden(name), name


def test_keys_end_at_the_last_dot() -> None:
    for path in ("a.png", "x/1.5.PNG", "a.b/c.tar.gz", "a.b/c", "x.", ".png"):
        key, extension = split_name(path)
        assert path.lower() in (f"{key}.{extension}".lower(), key.lower())
    assert split_name("x.y/1.5x.PNG") == ("x.y/1.5x", "png")


def test_a_line_names_the_most_frequent_kinds() -> None:
    left_out = LeftOut()
    assert left_out.line(Path("x")) is None
    for number in range(30):
        left_out.add_file(f"{number}.{number % 15}")
    line = left_out.line(Path("x"), "png")
    assert line is not None
    assert line.startswith("left out of x: 2 .0 files (0.0, ...), 2 .1 files (1.1, ...)")
    assert line.endswith(", 14 more; used are png")  # 8 kinds of 2 are named
