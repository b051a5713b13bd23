"""Guarantee 10 for sources: no code runs from data, and nothing is written outside."""

import io
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardstep.configs.errors import InputError
from shardstep.datasets.decode import decode
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.sources import open_source, surely_differs
from shardstep.datasets.sources.cifar10 import CIFAR10_CLASSES
from shardstep.datasets.sources.source import Source


def png(value: int, size: tuple[int, int] = (4, 3), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(buffer, "png")
    return buffer.getvalue()


def pixels_of(source: Source, number: int) -> np.ndarray:
    content = source.read(number)
    return content if isinstance(content, np.ndarray) else decode(content, "UNCHANGED")


def make_tree(root: Path) -> Path:
    for split, names in (
        ("train", ("b_cat/2.png", "a_dog/1.png", "a_dog/0.png")),
        ("test", ("a_dog/9.png", "b_cat/8.png")),
    ):
        for name in names:
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(int(path.stem)))
    (root / "train" / "a_dog" / "notes.txt").write_text("not an image")
    return root


def test_image_folder(tmp_path: Path) -> None:
    source = open_source(str(make_tree(tmp_path)), "train")
    assert source.classes == ["a_dog", "b_cat"]
    assert source.labels.tolist() == [0, 0, 1]
    assert [int(pixels_of(source, number)[0, 0, 0]) for number in range(3)] == [0, 1, 2]


def test_image_folder_without_splits(tmp_path: Path) -> None:
    make_tree(tmp_path)
    assert len(open_source(str(tmp_path / "test"), "train").labels) == 2


@pytest.mark.parametrize("prefix", ["", "./"])
def test_tar_of_an_image_folder(tmp_path: Path, prefix: str) -> None:
    make_tree(tmp_path / "tree")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("train", "test"):
            tar.add(tmp_path / "tree" / name, prefix + name)
    source = open_source(str(tmp_path / "set.tar"), "test")
    assert source.classes == ["a_dog", "b_cat"]
    assert [int(pixels_of(source, number)[0, 0, 0]) for number in range(2)] == [9, 8]


def test_loose_images_are_an_error(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "train" / "lost.png").write_bytes(png(1))
    with pytest.raises(InputError, match="holds 1 image outside class folders, such as lost.png"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["nothing-here", "synthetic:", "synthetic:0", "synthetic:x"])
def test_unknown_sources(name: str) -> None:
    with pytest.raises(InputError):
        open_source(name, "train")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images in"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize("packed", [False, True])
def test_a_missing_split_does_not_become_a_class(tmp_path: Path, packed: bool) -> None:
    make_tree(tmp_path / "tree")
    (tmp_path / "tree" / "test").rename(tmp_path / "tree" / "val")
    path = tmp_path / "tree"
    if packed:
        path = tmp_path / "set.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "tree", "")
    with pytest.raises(InputError, match="has no test/, only train, val"):
        open_source(str(path), "test")


@pytest.mark.parametrize(
    ("folders", "split", "named"),
    [
        (["train", "val", "test"], "train", ["val"]),
        (["train", "validation", "test"], "train", ["validation"]),
        (["pets/train", "pets/dev", "pets/test"], "train", ["pets/dev"]),
        (["train", "val", "test"], "test", []),  # said once, for the training set
        (["train", "test"], "train", []),
    ],
)
def test_a_validation_set_beside_the_training_set_is_named(
    folders: list[str], split: str, named: list[str], tmp_path: Path
) -> None:
    for folder in folders:
        for name in ("cat", "dog"):
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "1.png").write_bytes(png(1))
    notes = [note for note in open_source(str(tmp_path), split).notes if "data.validation" in note]
    assert [note.partition(" is not used")[0] for note in notes] == [str(tmp_path / name) for name in named]


def test_synthetic_is_a_function_of_split_and_number() -> None:
    first, again = open_source("synthetic:50", "train"), open_source("synthetic:50", "train")
    assert np.array_equal(pixels_of(first, 49), pixels_of(again, 49))
    assert not np.array_equal(pixels_of(first, 0), pixels_of(open_source("synthetic:50", "test"), 0))


def test_digits_split() -> None:
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert len(train.labels) + len(test.labels) == 1797
    assert set(test.labels.tolist()) == set(range(10))
    assert pixels_of(train, 0).shape == (8, 8, 1)
    assert max(int(pixels_of(train, number).max()) for number in range(9)) == 255


# --- CIFAR-10's own archives ------------------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def batches() -> list[str]:
    return [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


def write_archive(path: Path, contents: dict[str, bytes], folder: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def python_batch(protocol: int = 2) -> bytes:
    return pickle.dumps({"data": IMAGES, "labels": LABELS, "batch_label": "x", "filenames": ["a"] * 10}, protocol)


def binary_batch() -> bytes:
    return b"".join(bytes([label]) + image.tobytes() for label, image in zip(LABELS, IMAGES, strict=True))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_python_archive(tmp_path: Path, protocol: int) -> None:
    content = python_batch(protocol)
    path = write_archive(tmp_path / "cifar-10-python.tar.gz", dict.fromkeys(batches(), content), "cifar-10-batches-py")
    check_cifar(path)


def test_binary_archive(tmp_path: Path) -> None:
    contents = {name + ".bin": binary_batch() for name in batches()}
    check_cifar(write_archive(tmp_path / "cifar-10-binary.tar.gz", contents, "cifar-10-batches-bin"))


def test_unpacked_folder(tmp_path: Path) -> None:
    for name in batches():
        (tmp_path / name).write_bytes(python_batch())
    check_cifar(tmp_path)


def test_folder_with_a_packed_archive(tmp_path: Path) -> None:
    contents = dict.fromkeys(batches(), python_batch())
    write_archive(tmp_path / "cifar-10-python.tar.gz", contents, "cifar-10-batches-py")
    check_cifar(tmp_path)


def check_cifar(path: Path) -> None:
    train, test = open_source(str(path), "train"), open_source(str(path), "test")
    assert (len(train.labels), len(test.labels)) == (50, 10)
    assert test.labels.tolist() == LABELS
    assert test.classes[3] == "cat"
    # planes of red, green and blue become pixels
    assert np.array_equal(pixels_of(test, 2), IMAGES[2].reshape(3, 32, 32).transpose(1, 2, 0))


class _Evil:
    def __reduce__(self) -> tuple:
        import os

        return os.system, ("touch /tmp/shardstep-was-here",)


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    marker = Path("/tmp/shardstep-was-here")
    marker.unlink(missing_ok=True)
    evil = pickle.dumps({"data": IMAGES, "labels": LABELS, "more": _Evil()})
    path = write_archive(tmp_path / "x.tar.gz", dict.fromkeys(batches(), evil), "c")
    with pytest.raises(InputError, match="no batch of CIFAR-10 needs"):
        open_source(str(path), "train")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"no pickle at all", pickle.dumps([1, 2]), pickle.dumps({"data": 3})]
)
def test_damaged_batches(tmp_path: Path, content: bytes) -> None:
    for name in batches():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="is not a batch of CIFAR-10"):
        open_source(str(tmp_path), "train")


def test_a_flipped_byte_of_a_packed_archive_is_found(tmp_path: Path) -> None:
    contents = {name + ".bin": binary_batch() for name in batches()}
    path = write_archive(tmp_path / "cifar-10-binary.tar.gz", contents, "b")
    intact = path.read_bytes()
    for place in range(100, len(intact), len(intact) // 40):  # before that, gzip keeps a name and a time
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        with pytest.raises(InputError):
            open_source(str(path), "train")


def test_labels_out_of_range(tmp_path: Path) -> None:
    for name in batches():
        (tmp_path / (name + ".bin")).write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(InputError, match="label 10 is out of"):
        open_source(str(tmp_path), "test")


def test_members_that_point_outside_write_nothing(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with tarfile.open(inside / "x.tar", "w") as tar:
        info = tarfile.TarInfo("../../train/cat/evil.png")
        info.size = len(png(1))
        tar.addfile(info, io.BytesIO(png(1)))
    source = open_source(str(inside / "x.tar"), "train")
    assert (source.classes, source.read(0)) == (["cat"], png(1))  # in memory
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "x.tar"]


# --- the download -----------------------------------------------------------------------------------------------------


@pytest.fixture
def local_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Serves an archive instead of the real one; yields the number of requests, and how many of them to refuse."""
    import hashlib
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from torchvision.datasets import CIFAR10

    path = write_archive(tmp_path / "a.tar.gz", dict.fromkeys(batches(), python_batch()), "cifar-10-batches-py")
    content, state = path.read_bytes(), {"requests": 0, "refuse": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["requests"] += 1
            if state["requests"] <= state["refuse"]:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CIFAR10_SOURCE", raising=False)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_retried_and_kept(local_server: dict[str, int]) -> None:
    local_server["refuse"] = 2
    assert len(open_source("cifar10", "test").labels) == 10
    assert local_server["requests"] == 4  # two refused, one that looks for a redirection, one that is read
    open_source("cifar10", "train")
    assert local_server["requests"] == 4  # from the cache


def test_no_network_names_the_other_ways(local_server: dict[str, int]) -> None:
    local_server["refuse"] = 100
    with pytest.raises(InputError, match=r"in 3 tries.*CIFAR10_SOURCE.*digits, synthetic:N"):
        open_source("cifar10", "train")


def test_wrong_cifar10_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR10_SOURCE", "/nowhere/at/all")
    with pytest.raises(InputError, match="CIFAR10_SOURCE=/nowhere/at/all does not exist"):
        open_source("cifar10", "train")


def test_cifar10_source_without_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR10_SOURCE", str(tmp_path))
    with pytest.raises(InputError, match=f"CIFAR10_SOURCE={tmp_path}: no images in {tmp_path}"):
        open_source("cifar10", "train")


@pytest.mark.parametrize(
    ("source", "made_from", "classes", "differs"),
    [
        ("cifar10", "CIFAR-10", CIFAR10_CLASSES, False),
        ("cifar10", "tar of an image folder", CIFAR10_CLASSES, False),
        ("cifar10", "tar of an image folder", ["a", "b"], True),
        ("cifar10", "synthetic:20", CIFAR10_CLASSES, True),
        ("digits", "digits of scikit-learn", list("0123456789"), False),
        ("digits", "tars written elsewhere", list("0123456789"), False),
        ("digits", "image folder", ["a", "b"], True),
        ("digits", "synthetic:20", [f"class{label}" for label in range(10)], True),
        ("synthetic:020", "synthetic:20", [f"class{label}" for label in range(10)], False),
        ("synthetic:21", "synthetic:20", [f"class{label}" for label in range(10)], True),
        ("FOLDER", "image folder", ["a", "b"], False),  # of which there are only images of a by now
        ("FOLDER", "image folder", ["b", "c"], True),
        ("FOLDER", "digits of scikit-learn", ["a"], True),
        ("/nowhere/at/all", "image folder", ["a"], False),
        ("~nobody-of-this-name/x", "image folder", ["a"], False),
        ("x" * 300, "image folder", ["a"], False),
    ],
)
def test_shards_of_another_source_are_known_by_their_names(
    source: str, made_from: str, classes: list[str], differs: bool, shards: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("CIFAR10_SOURCE", raising=False)
    (tmp_path / "Train" / "a").mkdir(parents=True)
    source = str(tmp_path) if source == "FOLDER" else source
    manifest = replace(open_shards(shards / "train").manifest, made={"source": made_from}, classes=classes)
    assert surely_differs(source, manifest, "train") == differs
    monkeypatch.setenv("CIFAR10_SOURCE", str(tmp_path))  # may hold any classes
    if source == "cifar10":
        assert surely_differs(source, manifest, "train") == made_from.startswith("synthetic:")
