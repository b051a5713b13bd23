"""A recipe's name and overrides to a Recipe: YAML first, then `section.key=value`; all problems are reported at once."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shardstep.configs.components import first_line, neighbours, refusal
from shardstep.configs.errors import InputError
from shardstep.configs.files import write_atomically
from shardstep.configs.resolve import with_keys
from shardstep.configs.schema import OPEN_SECTIONS, DataConfig, Recipe

_SECTIONS = {section.name: section for section in dataclasses.fields(Recipe)}
_RENAMED = {("train", "conv_gradients"): "convolutions"}  # old: new; runs of earlier versions have old keys
DEFAULT_TRAIN = "data/cifar10/train"
"""The training set of a recipe that names neither folders nor a source."""
_ON_DEVICE = {"on_cpu": "cpu", "on_cuda": "cuda"}
"""Parts of a recipe file that apply on one kind of device only; each holds sections, like the file itself."""


@dataclass
class LoadedRecipe:
    """A recipe as it was read, with the problems found so far."""

    recipe: Recipe  # without the parts that apply on one kind of device only
    source: str = ""  # the path or name that was given
    problems: list[str] = field(default_factory=list)  # what could not be read
    notes: list[str] = field(default_factory=list)  # what the user should know
    folders: tuple[Path, ...] = ()  # where files of code that it names are looked for, in this order
    given: set[tuple[str, str]] = field(
        default_factory=set
    )  # section and key of each value in the file and the overrides
    given_folders: dict[str, str] = field(default_factory=dict)
    """data.train and data.test, where an override without a data.source beside it gives another folder than the file."""
    for_device: Callable[[str], "LoadedRecipe"] | None = None
    """Loads the recipe for a device (cpu or cuda); None if it is the same for all devices."""


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the toolkit."""
    folder = resources.files("shardstep.configs")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def is_override(word: str) -> bool:
    """Check whether a command's first word is an override such as `log.wandb=offline`, rather than a recipe."""
    return "=" in word and not Path(word).is_file()


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given its path or its name in configs/.

    Raises:
        InputError: there is no such recipe.
    """
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return Path(str(resources.files("shardstep.configs"))) / f"{name}.yaml"
    raise InputError(f"no recipe {name!r}: neither a file nor a built-in recipe; {neighbours(name, recipe_names())}")


def load_recipe(name: str, overrides: Iterable[str] = (), device: str | None = None) -> LoadedRecipe:
    """Read a recipe and apply overrides of the form section.key=value.

    Args:
        name: a path, or the name of a recipe in configs/.
        overrides: they take precedence over the file.
        device: cpu or cuda, to apply the file's part for this device, before the overrides.

    Raises:
        InputError: the recipe does not exist, or is not YAML. Problems inside it are returned in `problems`.
    """
    path, overrides = find_recipe(name), list(overrides)
    beside = (path.absolute().parent,) if path == Path(name) else ()  # a built-in recipe has no code beside it
    loaded = LoadedRecipe(Recipe(), source=name, folders=(*beside, Path.cwd()))
    config = OmegaConf.structured(Recipe)
    for node in (config, *(config[section] for section in _SECTIONS)):
        OmegaConf.set_readonly(node, False)  # OmegaConf makes the sections of frozen dataclasses read-only

    written = _read_yaml(path)
    on_device = {part: written.pop(part) for part in _ON_DEVICE if part in written}
    _apply(config, written, loaded.problems)
    for part, content in on_device.items():
        problems: list[str] = []
        _apply(config if _ON_DEVICE[part] == device else config.copy(), content, problems)
        loaded.problems += [f"{part}: {problem}" for problem in problems]
    if on_device and device is None:
        loaded.for_device = partial(load_recipe, name, overrides)

    own_folders = _data_folders(config.data)
    settings = [_split_override(text, loaded.problems) for text in overrides]
    applied = [written, *(content for part, content in on_device.items() if _ON_DEVICE[part] == device)]
    loaded.given = {*_keys_in(applied), *((section, key) for section, key, _ in settings)}
    # Names first: a new name drops the recipe's options of the old one; options on the command line are for the new one.
    settings.sort(key=lambda setting: setting[1] != "name")
    for section, key, value in settings:
        if section in OPEN_SECTIONS and key == "name":
            _change_name(config, section, value, loaded)
        elif section:
            _set(config, section, key, value, loaded.problems)

    _choose_training_set(config, [key for section, key, _ in settings if section == "data"], loaded)
    try:
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise InputError(f"{path}: {first_line(error)}") from None
    assert isinstance(recipe, Recipe)
    loaded.recipe = _with_default_paths(recipe, path.stem)
    if not any((section, key) == ("data", "source") for section, key, _ in settings):
        for split, folder in _data_folders(loaded.recipe.data).items():
            if folder and _real_path(folder) != _real_path(own_folders[split]):
                loaded.given_folders[f"data.{split}"] = folder
    return loaded


def _keys_in(parts: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Return section and key of each value in parts of a file that hold sections."""
    for part in parts:
        for section, keys in part.items() if isinstance(part, dict) else ():
            yield from ((section, str(key)) for key in keys) if isinstance(keys, dict) else ()


def _choose_training_set(config: DictConfig, overridden: list[str], loaded: LoadedRecipe) -> None:
    """Keep one of data.train and data.mix: what is overridden replaces the other, else the mix does."""
    train, mix = config.data.train, config.data.mix
    if not (train and mix):
        return
    if "train" in overridden and "mix" not in overridden:
        loaded.notes.append(f"data.train={train} replaces data.mix")
        config.data.mix = []
    else:
        loaded.notes.append(f"data.mix replaces data.train={train}")
        config.data.train = ""


def _with_default_paths(recipe: Recipe, default_name: str) -> Recipe:
    """Fill in the name and the folders that the recipe leaves empty."""
    name = recipe.run.name or default_name
    run = {"name": name, "dir": recipe.run.dir or f"runs/{name}"}
    return with_keys(recipe, run=run, data=_data_folders(recipe.data))


def _data_folders(data: DataConfig | DictConfig) -> dict[str, str]:
    """Return the folders of the training and test set; those left empty are named after the source, but not for a mix."""
    folder = Path("data") / source_name(data.source) if data.source else Path(DEFAULT_TRAIN).parent
    train = "" if data.mix else str(folder / "train")
    return {"train": data.train or train, "test": data.test or str(folder / "test")}


def _real_path(folder: str) -> str:
    return os.path.realpath(os.path.expanduser(folder))


def source_name(source: str) -> str:
    """Return a short name for a source of images: cifar10, digits, synthetic-N, or that of its folder or archive."""
    name = os.path.basename(os.path.abspath(os.path.expanduser(source)))
    return re.sub(r"\.(tar|tar\.gz|tgz|npz|parquet)$", "", name).replace(".py:", "-").replace(":", "-")


def recipe_text(recipe: Recipe) -> str:
    """Format a recipe as YAML that load_recipe can read."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, default_flow_style=None, width=110)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe to a file that load_recipe can read."""
    write_atomically(path, recipe_text(recipe).encode())


def _apply(config: DictConfig, written: Any, problems: list[str]) -> None:
    """Apply sections to a config. An open section replaces the old one if it has a name; otherwise its keys are added."""
    if not isinstance(written, dict):
        problems.append(f"it must hold sections (train, optimizer, ...), not {written!r}")
        return
    for section, content in written.items():
        if section not in _SECTIONS:
            problems.append(f"{section} is not a section; {neighbours(str(section), [*_SECTIONS, *_ON_DEVICE])}")
        elif not isinstance(content, dict):
            problems.append(f"{section} must be a mapping of keys to values, not {content!r}")
        elif section in OPEN_SECTIONS:
            if all(isinstance(key, str) for key in content):
                config[section] = content if "name" in content else OmegaConf.merge(config[section], content)
            else:
                problems.append(f"{section} must map names to values, not {content}")
        else:
            for key, value in content.items():
                _set(config, section, str(key), value, problems)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold sections (run, data, model, ...), not a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _split_override(text: str, problems: list[str]) -> tuple[str, str, Any]:
    """Split "section.key=value" and parse the value as YAML, as OmegaConf does (1e-3 is a number)."""
    name, equals, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and key):
        hint = f"; did you mean {name}.name={value}?" if equals and name in OPEN_SECTIONS else ""
        problems.append(f"{text!r} is not of the form section.key=value{hint}")
        return "", "", None
    if section not in _SECTIONS:
        problems.append(f"{section} is not a section; {neighbours(section, _SECTIONS)}")
        return "", "", None
    if _takes_text(section, key):
        return section, key, value  # not parsed: YAML would read a run named 007 as 7
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        problems.append(f"{name}: {value!r} cannot be read: {first_line(error)}")
        return "", "", None
    assert isinstance(parsed, dict)
    return section, key, parsed["value"]


def _takes_text(section: str, key: str) -> bool:
    if section in OPEN_SECTIONS:
        return key == "name"
    section_class: Any = _SECTIONS[section].type
    return any(option.name == key and option.type is str for option in dataclasses.fields(section_class))


def _change_name(config: DictConfig, section: str, name: str, loaded: LoadedRecipe) -> None:
    if "${" in name:
        loaded.problems.append(f"{section}.name={name} is not a name")
        return
    previous = dict(OmegaConf.to_container(config[section]))  # type: ignore[arg-type] # a mapping, by the schema
    if previous.get("name") == name:
        return
    dropped = [f"{key}={value}" for key, value in previous.items() if key != "name"]
    if dropped:
        verb = "apply" if len(dropped) > 1 else "applies"
        loaded.notes.append(
            f"{section}.name={name} replaces {previous.get('name')}: its {', '.join(dropped)} no longer {verb}"
        )
    config[section] = {"name": name}


def _set(config: DictConfig, section: str, key: str, value: Any, problems: list[str]) -> None:
    if section in OPEN_SECTIONS:
        try:
            config[section][key] = value
        except OmegaConfBaseException as error:
            problems.append(f"{section}.{key}: {first_line(error)}")
        return
    key = _RENAMED.get((section, key), key)
    known = list(config[section])
    if key not in known:
        problems.append(f"{section}.{key} is not a key; {neighbours(key, known)}")
        return
    try:
        OmegaConf.update(config, f"{section}.{key}", value)
    except OmegaConfBaseException as error:
        problems.append(f"{section}.{key}: {refusal(value, error)}")
