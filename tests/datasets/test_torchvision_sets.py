"""Data sets of torchvision: each one made tiny, in the form that its download has on disk, with the traps of that form."""

import bz2
import functools
import gc
import gzip
import hashlib
import http.server
import json
import pickle
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardstep.configs.errors import InputError
from shardstep.datasets.sources import open_source, surely_differs
from shardstep.datasets.sources.torchvision_sets import TORCHVISION_SETS
from shardstep.datasets.write import write_shards
from tests.datasets.test_known_forms import classes_of_values
from tests.datasets.test_sources import pixels_of

Expected = tuple[dict[int, str], dict[int, str]]  # of train and test: the class of each image, by its upper left value


def picture(path: Path, value: int, kind: str = "jpeg") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (value,) * 3).save(path, kind, **({"quality": 95} if kind == "jpeg" else {}))


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def planes(values: list[int], *shape: int) -> np.ndarray:
    """Images with a value in each; the upper right corner has 7, to see whether they are turned."""
    images = np.ones((len(values), *shape), np.uint8) * np.array(values, np.uint8).reshape(-1, *[1] * len(shape))
    images[..., 0, -1] = 7
    return images


def make_cifar100(root: Path) -> Expected:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    names = [f"class {number}" for number in range(100)]
    for part, values, labels in (("train", [1, 2], [99, 0]), ("test", [3], [11])):
        batch = {
            "data": planes(values, 3, 32, 32).reshape(-1, 3072),
            "fine_labels": labels,
            "coarse_labels": [0] * len(labels),
        }
        (folder / part).write_bytes(pickle.dumps(batch, 2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names, "coarse_label_names": ["x"]}, 2))
    return {1: "class 99", 2: "class 0"}, {3: "class 11"}


def make_mnist(root: Path, folder: str, names: list[str]) -> Expected:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, values, labels in (("train", [1, 2], [9, 0]), ("t10k", [3], [4])):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(planes(values, 28, 28)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.array(labels)))
    return {1: names[9], 2: names[0]}, {3: names[4]}


def make_emnist(root: Path, which: str, names: str, first: int = 0) -> Expected:
    raw = root / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    last = len(names) - 1
    for part, values, labels in (("train", [1, 2], [last, 0]), ("test", [3], [3])):
        lying = planes(values, 28, 28).transpose(0, 2, 1)
        (raw / f"emnist-{which}-{part}-images-idx3-ubyte").write_bytes(idx(lying))
        (raw / f"emnist-{which}-{part}-labels-idx1-ubyte").write_bytes(idx(np.array(labels) + first))
    return {1: names[last], 2: names[0]}, {3: names[3]}


def make_usps(root: Path) -> Expected:
    for name, rows in (
        ("usps.bz2", [(1, -1.0), (10, 1.0)]),
        ("usps.t.bz2", [(4, 0.0)]),
    ):  # digit + 1, values from -1 to 1
        lines = [" ".join([str(label), *(f"{n}:{value}" for n in range(1, 257))]) for label, value in rows]
        (root / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    return {0: "0", 255: "9"}, {127: "3"}


def make_svhn(root: Path) -> Expected:
    from scipy.io import savemat

    for part, values, labels in (("train", [1, 2], [10, 9]), ("test", [3, 4], [1, 10])):  # 10 is the digit 0
        images = np.stack([planes(values, 32, 32)] * 3, axis=-1).transpose(1, 2, 3, 0)  # (N, H, W, 3) -> (H, W, 3, N)
        savemat(root / f"{part}_32x32.mat", {"X": images, "y": np.array(labels, np.uint8)[:, np.newaxis]})
    return {1: "0", 2: "9"}, {3: "1", 4: "0"}


def make_stl10(root: Path) -> Expected:
    folder = root / "stl10_binary"
    folder.mkdir()
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    for part, values, labels in (("train", [1, 2], [1, 10]), ("test", [3], [5])):  # columns first, labels from 1
        planes(values, 3, 96, 96).transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")
        np.array(labels, np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    return {1: "airplane", 2: "truck"}, {3: "deer"}


def make_food101(root: Path) -> Expected:
    for part, content in (
        ("train", {"waffles": ["waffles/9"], "ramen": ["ramen/8"]}),
        ("test", {"ramen": ["ramen/7"], "waffles": []}),
    ):
        text(root / "food-101" / "meta" / f"{part}.json", json.dumps(content))
    for name, value in (("waffles/9", 90), ("ramen/8", 80), ("ramen/7", 70)):
        picture(root / "food-101" / "images" / f"{name}.jpg", value)
    return {90: "waffles", 80: "ramen"}, {70: "ramen"}


def make_flowers102(root: Path) -> Expected:
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    folder = root / "flowers-102"
    for number in range(1, 7):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", 10 * number)
    savemat(folder / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]})
    savemat(folder / "imagelabels.mat", {"labels": [[1, 102, 2, 1, 102, 1]]})  # from 1
    first, second, last = (Flowers102.classes[label] for label in (0, 1, 101))
    return {10: first, 20: last, 30: second, 40: first}, {50: last, 60: first}


def make_oxford_pets(root: Path) -> Expected:
    folder = root / "oxford-iiit-pet"
    rows = {"Abyssinian_1": 1, "great_pyrenees_2": 2, "Abyssinian_3": 1}
    for number, name in enumerate(rows, 1):
        picture(folder / "images" / f"{name}.jpg", 10 * number)
    for part, names in (
        ("trainval", ["Abyssinian_1", "great_pyrenees_2"]),
        ("test", ["Abyssinian_3", "great_pyrenees_2"]),
    ):
        text(folder / "annotations" / f"{part}.txt", "".join(f"{name} {rows[name]} 1 1\n" for name in names))
    return {10: "Abyssinian", 20: "Great Pyrenees"}, {30: "Abyssinian", 20: "Great Pyrenees"}


def make_fgvc_aircraft(root: Path) -> Expected:
    folder = root / "fgvc-aircraft-2013b" / "data"
    text(folder / "variants.txt", "707-320\nA300 B4\n")
    text(folder / "images_variant_trainval.txt", "0000010 A300 B4\n0000020 707-320\n")
    text(folder / "images_variant_test.txt", "0000030 A300 B4\n")
    for value in (10, 20, 30):
        picture(folder / "images" / f"{value:07d}.jpg", value)
    return {10: "A300 B4", 20: "707-320"}, {30: "A300 B4"}


def make_dtd(root: Path) -> Expected:
    folder = root / "dtd" / "dtd"
    files = ["train woven/a", "train dotted/a", "val dotted/b", "test woven/c", "test dotted/d", "val woven/e"]
    for value, (part, name) in enumerate((file.split() for file in files), 1):
        picture(folder / "images" / f"{name}.jpg", 10 * value)
        labels = folder / "labels" / f"{part}1.txt"
        text(labels, (labels.read_text() if labels.exists() else "") + f"{name}.jpg\n")
    return {10: "woven", 20: "dotted", 30: "dotted", 60: "woven"}, {40: "woven", 50: "dotted"}


def make_gtsrb(root: Path) -> Expected:
    folder = root / "gtsrb"
    for label in range(43):
        picture(folder / "GTSRB" / "Training" / f"{label:05d}" / "00000_00000.ppm", 100 + label, "ppm")
    picture(folder / "GTSRB" / "Final_Test" / "Images" / "00000.ppm", 5, "ppm")
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    text(folder / "GT-final_test.csv", f"{header}\n00000.ppm;9;8;1;1;7;7;16\n")
    return {100 + label: str(label) for label in range(43)}, {5: "16"}


def make_folders(root: Path, names: list[str], kind: str = "jpeg") -> Expected:
    """Files such as train/cat/1.jpg; those of val or valid are for testing only where there is no test."""
    found: dict[str, dict[int, str]] = {"train": {}, "test": {}}
    has_test = any("/test/" in name for name in names)
    for value, name in enumerate(names, 1):
        picture(root / name, 10 * value, kind)
        part, label = name.split("/")[-3:-1]
        found["train" if part == "train" or (has_test and part != "test") else "test"][10 * value] = label
    return found["train"], found["test"]


def make_imagenette(root: Path, folder: str) -> Expected:
    files = [
        f"{folder}/{part}/{wnid}/{part}_1.JPEG" for part in ("train", "val") for wnid in ("n03028079", "n01440764")
    ]
    names = {"n03028079": "church", "n01440764": "tench"}
    train, test = make_folders(root, files)
    return {value: names[wnid] for value, wnid in train.items()}, {value: names[wnid] for value, wnid in test.items()}


def make_unsplit(root: Path, folders: list[str], pattern: str) -> Expected:
    """Five images of each class, of which the last is for testing."""
    found: Expected = {}, {}
    for label, folder in enumerate(folders):
        for number in range(5):
            value = 100 * label + 10 * number
            picture(root / folder / pattern.format(number), value)
            found[number == 4][value] = folder.split("/", 2)[2] if "SUN397" in folder else folder.rpartition("/")[2]
    return found


def make_sun397(root: Path) -> Expected:
    text(root / "SUN397" / "ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    return make_unsplit(root, ["SUN397/a/abbey", "SUN397/a/apartment_building/outdoor"], "sun_{}.jpg")


DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
BALANCED = DIGITS + LETTERS + "abdefghnqrt"
COUNTRIES = [f"country211/{part}/{code}/{part}.jpg" for part in ("train", "valid", "test") for code in ("AD", "ZW")]
SENTENCES = [
    f"rendered-sst2/{part}/{name}/1.png" for part in ("train", "valid", "test") for name in ("negative", "positive")
]
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
MAKERS: dict[str, Callable[[Path], Expected]] = {
    "cifar100": make_cifar100,
    "mnist": lambda root: make_mnist(root, "MNIST", list(DIGITS)),
    "fashion_mnist": lambda root: make_mnist(root, "FashionMNIST", CLOTHES),
    "kmnist": lambda root: make_mnist(root, "KMNIST", ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]),
    "emnist": lambda root: make_emnist(root, "balanced", BALANCED),
    "emnist_byclass": lambda root: make_emnist(root, "byclass", DIGITS + LETTERS + LETTERS.lower()),
    "emnist_bymerge": lambda root: make_emnist(root, "bymerge", BALANCED),
    "emnist_letters": lambda root: make_emnist(root, "letters", LETTERS.lower(), first=1),
    "emnist_digits": lambda root: make_emnist(root, "digits", DIGITS),
    "usps": make_usps,
    "svhn": make_svhn,
    "stl10": make_stl10,
    "food101": make_food101,
    "flowers102": make_flowers102,
    "oxford_pets": make_oxford_pets,
    "fgvc_aircraft": make_fgvc_aircraft,
    "dtd": make_dtd,
    "gtsrb": make_gtsrb,
    "country211": lambda root: make_folders(root, COUNTRIES),
    "rendered_sst2": lambda root: make_folders(root, SENTENCES, "png"),
    "imagenette": lambda root: make_imagenette(root, "imagenette2"),
    "imagenette_160": lambda root: make_imagenette(root, "imagenette2-160"),
    "eurosat": lambda root: make_unsplit(root, ["eurosat/2750/AnnualCrop", "eurosat/2750/River"], "x_{}.jpg"),
    "sun397": make_sun397,
}


@pytest.fixture
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision takes files of any content: ours are no copies of the real ones."""
    from torchvision.datasets import cifar, flowers102, stl10, svhn

    for module in (cifar, flowers102, stl10, svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.mark.parametrize("name", TORCHVISION_SETS)
@pytest.mark.usefixtures("any_checksum")
def test_every_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root").mkdir()
    train, test = MAKERS[name](tmp_path / "root")
    monkeypatch.setenv("TORCHVISION_SOURCE", str(tmp_path / "root"))
    sources = {split: open_source(name, split) for split in ("train", "test")}
    assert classes_of_values(sources["train"]) == train
    assert classes_of_values(sources["test"]) == test
    assert sources["train"].classes == sources["test"].classes
    assert all(source.has_splits for source in sources.values())
    if "mnist" in name or name in ("svhn", "stl10", "cifar100"):
        pixels = pixels_of(sources["test"], 0)
        assert (pixels[0, -1, 0], pixels[-1, 0, 0]) == (7, 3)  # upright: rows, then columns
    manifest = write_shards(name, "test", tmp_path / "out")
    assert manifest.samples == len(test)
    assert not surely_differs(name, manifest, "test")
    assert surely_differs("svhn" if name != "svhn" else "stl10", manifest, "test")


def test_photographs_keep_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_food101(tmp_path)
    monkeypatch.setenv("TORCHVISION_SOURCE", str(tmp_path))
    source = open_source("food101", "train")
    path = "food-101/images/waffles/9.jpg"
    assert {source.name(number): source.read(number) for number in range(2)}[path] == (tmp_path / path).read_bytes()
    assert write_shards("food101", "train", tmp_path / "out").encodings == ["jpg"]


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_a_folder_without_the_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHVISION_SOURCE", str(tmp_path))
    with pytest.raises(
        InputError, match=rf"{name} cannot be read from {tmp_path}: .*TORCHVISION_SOURCE names a folder"
    ):
        open_source(name, "train")


@pytest.mark.parametrize(
    ("name", "meant"), [("mnsit", "mnist"), ("cifar-100", "cifar100"), ("fashionmnist", "fashion_mnist")]
)
def test_names_that_are_nearly_right(name: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"no source '{name}'.* Did you mean {meant}\?"):
        open_source(name, "train")


# --- the download -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A local mirror of MNIST's archives; yields the number of requests, and how many of them to refuse."""
    from torchvision.datasets import MNIST

    make_mnist(tmp_path / "made", "MNIST", list(DIGITS))
    served, resources = tmp_path / "served", []
    served.mkdir()
    for path in sorted((tmp_path / "made" / "MNIST" / "raw").iterdir()):
        content = gzip.compress(path.read_bytes())
        (served / f"{path.name}.gz").write_bytes(content)
        resources.append((f"{path.name}.gz", hashlib.md5(content).hexdigest()))
    state = {"requests": 0, "refuse": 0}

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            state["requests"] += 1
            if state["requests"] <= state["refuse"]:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setenv("SHARDSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHVISION_SOURCE", raising=False)
    yield state
    gc.collect()  # torchvision leaves its connections to the collector, which warns: here, and not in another test
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_set_is_downloaded_once_with_all_splits(mirror: dict[str, int], tmp_path: Path) -> None:
    mirror["refuse"] = 1
    half = tmp_path / "cache" / "downloads" / "mnist.partial" / "MNIST" / "raw"
    half.mkdir(parents=True)
    (half / "train-images-idx3-ubyte").write_bytes(b"")  # of a download that was killed
    assert classes_of_values(open_source("mnist", "test")) == {3: "4"}
    requests = mirror["requests"]
    assert classes_of_values(open_source("mnist", "train")) == {1: "9", 2: "0"}
    assert mirror["requests"] == requests
    assert [path.name for path in (tmp_path / "cache" / "downloads").iterdir() if path.is_dir()] == ["mnist"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_without_a_network_the_other_ways_are_named(mirror: dict[str, int], tmp_path: Path) -> None:
    mirror["refuse"] = 1000
    with pytest.raises(
        InputError, match=r"mnist could not be downloaded by torchvision\.datasets\.MNIST in 3 tries.*point TORCH"
    ):
        open_source("mnist", "train")
    assert not (tmp_path / "cache" / "downloads").exists()
