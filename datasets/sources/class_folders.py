"""Where the class folders of an image folder are: below a folder of the split, below a single folder, or at the top.

People call their splits train, Train, training_set, seg_train, ...; none of these may pass for a class.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from shardstep.configs.errors import InputError
from shardstep.datasets.input_files import FileTree, is_hidden, is_image, joined

_SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "val", "valid": "val", "validation": "val", "eval": "val", "evaluation": "val", "dev": "val",
}  # fmt: skip
# What stands beside these words without naming anything: training_set, TestImages, seg_train, val2017.
_FILLERS = r"(?:set|data|images?|imgs?|pictures|photos|pics|samples|files|split|folder|seg)*"
_SPLIT_NAME = re.compile(f"{_FILLERS}({'|'.join(sorted(_SPLIT_WORDS, key=len, reverse=True))}){_FILLERS}")
_NO_CLASSES = {
    "image", "images", "img", "imgs", "jpegimages", "jpg", "jpeg", "jpegs", "png", "pngs", "photos", "pictures", "pics",
    "data", "dataset", "files", "masks", "labels", "annotations",
}  # fmt: skip
_MOST_WRAPPERS = 8


def find_class_folders(tree: FileTree, split: str) -> tuple[str, bool]:
    """Return the folder whose folders are the classes of a split, and whether there are folders for splits.

    Single folders that hold nothing but folders are passed through. See find_split_folder for the errors.
    """
    folder, has_splits = find_split_folder(tree, split)
    if not has_splits:
        return folder, False
    named_so = {folder.rpartition("/")[2].lower(), *_NO_CLASSES}
    return _unwrapped(tree, folder, lambda name: name.lower() in named_so or split_of(name) == split), True


def find_split_folder(tree: FileTree, split: str) -> tuple[str, bool]:
    """Return the folder of a split, or the folder that holds everything, and whether there are folders for splits.

    Raises:
        InputError: there are folders of other splits only, or several for this one.
    """
    top = _unwrapped(tree, "", lambda name: name not in split_folders([name]))
    folders = visible_folders(tree, top)
    splits = split_folders(folders)
    if _train_is_a_class(tree, top, folders, splits):
        splits = {}
    if not splits:
        return top, False
    mine = [name for name in splits if splits[name] == split]
    chosen = split if split in mine else next(iter(mine), None)
    where = tree.where / top
    if chosen is None:
        raise InputError(
            f"{where} has no {split}/, only {', '.join(sorted(splits))}: give the folder itself as the source. If it is a "
            f"class, move all class folders into {where / split}"
        )
    if chosen != split and len(mine) > 1:
        raise InputError(f"{where} has several folders for {split}: {', '.join(sorted(mine))}. Give one as the source")
    return joined(top, chosen), True


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Return which folders, by their names, stand for the splits train, test or val.

    Names with other words in them do so only in pairs: pets_train beside pets_test, but not bullet_train alone.
    """
    names = list(names)
    found = {name: split for name in names if (split := split_of(name))}
    pairs: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for name in names:
        words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
        splits = [word for word in words if word in _SPLIT_WORDS]
        if len(splits) == 1:
            pairs[tuple(word for word in words if word not in splits)][name] = _SPLIT_WORDS[splits[0]]
    for pair in pairs.values():
        if len(set(pair.values())) > 1:
            found |= pair
    return found


def split_of(name: str) -> str | None:
    """Return train, test or val, if a name stands for one of them."""
    match = _SPLIT_NAME.fullmatch(re.sub(r"[^a-z]", "", name.lower()))
    return _SPLIT_WORDS[match[1]] if match else None


def refuse_what_are_no_classes(images: list[list[str]], has_splits: bool, where: str) -> None:
    """Check the folders that hold images.

    Args:
        images: the parts of the path of each image below the class folders' folder.
        has_splits: whether that is the folder of a split.
        where: for messages.

    Raises:
        InputError: all images are in folders such as images/, or there are folders of splits in the class folders.
    """
    classes = sorted({parts[0] for parts in images})
    if all(name.lower() in _NO_CLASSES for name in classes):
        raise InputError(
            f"{where} has no class folders: all images are in {', '.join(f'{name}/' for name in classes)}. Sort them into "
            f"<class>/<file>, or give a table of labels with --labels (data.labels in a recipe)"
        )
    inner: dict[str, set[str]] = defaultdict(set)
    for parts in images:
        if len(parts) > 2:
            inner[parts[0]].add(parts[1])
    for name in classes:
        splits = split_folders(sorted(inner[name]))
        # vehicles/train may well be trains
        if not has_splits and set(splits.values()) - {"train"}:
            found = ", ".join(f"{name}/{split}" for split in splits)
            raise InputError(f"{where} has splits inside class folders ({found}): write them as <split>/<class>/<file>")


def folders_like_splits(images: list[list[str]]) -> list[str]:
    """Return the first folders if most of them hold folders of the same names, as tr/cat, tr/dog, te/cat and te/dog do.

    `images`: the parts of the path of each image.
    """
    inner: dict[str, set[str]] = defaultdict(set)
    for parts in images:
        inner[parts[0]] |= {name for name in parts[1:-1] if name.lower() not in _NO_CLASSES}
    holders = Counter(name for names in inner.values() for name in names)
    shared = {name for name, times in holders.items() if times > 1}
    found = sorted(name for name, names in inner.items() if len(names & shared) > 1)
    return found if len(found) > max(1, len(inner) // 2) else []


def split_in_name(path: str) -> str | None:
    """Return the split that the name of a file says in one of its words, or else that of its folder, and so on upwards."""
    for part in reversed(path.split("/")):
        splits = {split for word in re.findall("[a-z]+", part.lower()) if (split := split_of(word))}
        if len(splits) == 1:
            return splits.pop()
    return None


def visible_folders(tree: FileTree, folder: str) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    return sorted(entry.name for entry in tree.entries(folder) if entry.kind == "folder" and not is_hidden(entry.name))


def _unwrapped(tree: FileTree, start: str, may_pass: Callable[[str], bool]) -> str:
    """Return the first folder below `start` that holds several, or `start` if single folders lead to images only."""
    folder = start
    for _ in range(_MOST_WRAPPERS):
        folders = visible_folders(tree, folder)
        if not folders or _holds_images(tree, folder):
            return start
        if len(folders) > 1 or not may_pass(folders[0]):
            return folder
        folder = joined(folder, folders[0])
    return start


def _train_is_a_class(tree: FileTree, top: str, folders: list[str], splits: dict[str, str]) -> bool:
    """Check whether train/ is the vehicle: no other split is there, and it holds images itself, as a folder beside it."""
    if [name.lower() for name in splits] != ["train"]:
        return False
    holding = [name for name in folders if _holds_images(tree, joined(top, name))]
    return set(splits) < set(holding)


def _holds_images(tree: FileTree, folder: str) -> bool:
    return any(entry.kind != "folder" and is_image(entry.name) for entry in tree.entries(folder))
