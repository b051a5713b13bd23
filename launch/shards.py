"""Write, check and inspect data sets of WebDataset shards.

shardstep shards write --source SRC --split train --out DIR [--samples-per-shard N] [--seed S] [--limit N]
                       [--classes-of DIR] [--bad-images skip]
                       [--orientation follow|ignore] [--resize N [--quality Q]]
                       [--labels FILE] [--image-column NAME] [--label-column NAME]
shardstep shards verify DIR
shardstep shards info DIR
shardstep shards index DIR [--label FIELD] [--classes NAME,NAME,...|@FILE] [--first-label N]
                       [--orientation follow|ignore] [--force]
shardstep shards order DIR [DIR ... --weights W,W,...] --seed S --epoch E [--start P --count N]
                       [--lanes L --window-shards W --order-version 1|2]
                       [--sampling uniform|balanced|{weights: ...} --repeats N]
shardstep shards look DIR --recipe RECIPE [section.key=value ...] --grid PICTURE [--epoch E] [--start P] [--count N]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from shardstep.configs.errors import InputError
from shardstep.configs.load import is_override, load_recipe
from shardstep.configs.text import count, listed, printable
from shardstep.launch.cli import run_script

if TYPE_CHECKING:
    from shardstep.configs.resolve import ResolvedDataConfig
    from shardstep.datasets.manifest import Manifest

_IN_GRID, _MOST_IN_GRID = 16, 64  # images that `look` draws: by default, at most


def main(arguments: list[str]) -> int:
    """Run the subcommand and return the exit code."""
    parser = _parser()
    args, more = parser.parse_known_args(arguments)
    if args.command == "look":  # argparse leaves over what follows the options
        args.overrides += [word for word in more if is_override(word) and not word.startswith("-")]
        more = [word for word in more if word not in args.overrides]
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    commands = {"write": _write, "verify": _verify, "info": _info, "index": _index, "order": _order, "look": _look}
    return commands[args.command](args)


def _parser() -> argparse.ArgumentParser:
    from shardstep.configs.schema import OrderVersion, Orientation
    from shardstep.datasets.order import ORDER_VERSION
    from shardstep.datasets.stored_images import QUALITY
    from shardstep.datasets.write import SAMPLES_PER_SHARD, BadImages

    parser = argparse.ArgumentParser(prog="shardstep shards", description="Write, check and inspect data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("write", help="write shards from a source of images").add_argument
    sources = (
        "cifar10, mnist and other data sets of torchvision, digits, synthetic:N, a folder or .tar of images in "
        "<class>/<file> or with a table of labels, or a published form, see docs/data.md"
    )
    add("--source", required=True, help=sources)
    add("--split", choices=["train", "test"], default="train", help="split to write (default: train)")
    add("--out", type=Path, required=True, help="folder to create")
    per_shard = "images per tar (default: %(default)s)"
    add("--samples-per-shard", type=int, metavar="N", default=SAMPLES_PER_SHARD, help=per_shard)
    add("--seed", type=int, default=0, help="seed of the shuffle and of --limit's choice (default: 0)")
    add("--limit", type=int, metavar="N", help="write N images, balanced over the classes (default: all)")
    classes_of = "use the classes of this data set (default: those of the source)"
    add("--classes-of", type=Path, metavar="DIR", help=classes_of)
    bad_images = "treat files that cannot be decoded as an error, or skip and list them (default: refuse)"
    add("--bad-images", choices=get_args(BadImages), default="refuse", help=bad_images)
    orientation = "turn pictures upright, as EXIF says, or read them as they are stored"
    add("--orientation", choices=get_args(Orientation), default="follow", help=f"{orientation} (default: follow)")
    add("--resize", type=int, metavar="N", help="scale images down until their shorter side has N pixels")
    add(
        "--quality",
        type=int,
        metavar="Q",
        help=f"quality of the JPEGs that --resize makes, 1 to 100 (default: {QUALITY})",
    )
    table = "table of labels: .csv, .tsv, .jsonl, .parquet or .txt; {split} in the path stands for the split"
    add("--labels", metavar="FILE", help=table)
    of_images = "column with the images' names or content (default: the one whose name says so)"
    add("--image-column", metavar="NAME", help=of_images)
    of_labels = "column with the labels (default: the one whose name says so, or the only one left)"
    add("--label-column", metavar="NAME", help=of_labels)
    separator = "what stands between several labels in that column, such as '|'; rows of one image then add up"
    add("--label-separator", metavar="TEXT", help=separator)
    verify = "compare every byte with the manifest, and decode every image"
    for name, what in (("verify", verify), ("info", "print counts, classes and sizes")):
        commands.add_parser(name, help=what).add_argument("dir", type=Path)
    add = commands.add_parser("index", help="write manifest.json and index for existing tars").add_argument
    add("dir", type=Path)
    label = (
        "where the label of a sample is, a number or a name: cls, txt, index, or json:path.to.label (default: that of the "
        "manifest replaced, else numbers in cls)"
    )
    add("--label", metavar="FIELD", help=label)
    names = (
        "class names by label, separated by commas and quoted as in a CSV file, or @FILE with one name a line (default: "
        "those of the manifest replaced, else numbers)"
    )
    add("--classes", metavar="NAME,NAME,...|@FILE", help=names)
    first_label = "label of the first class (default: that of the manifest replaced, else 0)"
    add("--first-label", type=int, metavar="N", help=first_label)
    replaced = "(default: that of the manifest replaced, else follow)"
    add("--orientation", choices=get_args(Orientation), help=f"{orientation} {replaced}")
    add("--force", action="store_true", help="replace an existing manifest")
    add = commands.add_parser("order", help="print position and key of samples in the global order").add_argument
    add("dir", nargs="+", help="data.train of the run, or the folders of its data.mix")
    weights = "weights of several folders, as in data.mix, separated by commas (default: 1 each)"
    add("--weights", metavar="W,W,...", help=weights)
    add("--seed", type=int, default=0, help="seed of the run (default: 0)")
    add("--epoch", type=int, default=0, help="epoch, from 0 (default: 0)")
    add("--start", type=int, default=0, help="first position (default: 0)")
    add("--count", type=int, help="number of positions (default: to the end of the epoch)")
    add("--lanes", type=int, default=1, help="data.lanes of the run (default: 1)")
    add("--window-shards", default="auto", help="data.window_shards: a number, all, or auto (default: auto)")
    add("--sampling", default="uniform", help="data.sampling of the run, such as balanced (default: uniform)")
    add("--repeats", type=int, default=1, metavar="N", help="data.repeats of the run (default: 1)")
    version = "data.order_version of the run (default: %(default)s, that of new runs)"
    add("--order-version", type=int, choices=get_args(OrderVersion), default=ORDER_VERSION, help=version)
    _add_look(commands.add_parser("look", help="draw images as training reads them, with their labels").add_argument)
    return parser


def _add_look(add: Callable[..., object]) -> None:
    add("dir", type=Path, help="shards, in the place of the recipe's data.train")
    add("overrides", nargs="*", metavar="section.key=value", help="such as data.resize=64")
    add("--recipe", required=True, help="a YAML file, or the name of a recipe")
    add("--grid", type=Path, required=True, metavar="PICTURE", help="the picture to write, such as look.png")
    add("--epoch", type=int, metavar="E", default=0, help="epoch, from 0 (default: 0)")
    add("--start", type=int, metavar="P", default=0, help="first position in the global order (default: 0)")
    add(
        "--count",
        type=int,
        metavar="N",
        help=f"number of images, at most {_MOST_IN_GRID} (default: {_IN_GRID}, or to the end)",
    )


def _write(args: argparse.Namespace) -> int:
    from shardstep.datasets.sources.tables import LabelOptions
    from shardstep.datasets.stored_images import ImageOptions
    from shardstep.datasets.write import write_shards

    sizes = (args.samples_per_shard, args.seed, args.limit)
    labels = LabelOptions(args.labels, args.image_column, args.label_column, args.label_separator)
    images = ImageOptions(args.orientation, args.resize, args.quality)
    manifest = write_shards(args.source, args.split, args.out, *sizes, args.bad_images, args.classes_of, labels, images)
    print(printable(f"{args.out}: {_size(manifest)}, {manifest.bytes:,} bytes"))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from shardstep.datasets.manifest import open_shards
    from shardstep.datasets.scan import MOST_NAMED
    from shardstep.datasets.verify import undecodable_images, verify_shards

    problems = verify_shards(args.dir)
    if problems:
        raise InputError.from_problems(f"{args.dir} has changed since it was written", problems)
    problems = undecodable_images(open_shards(args.dir))
    if problems:
        headline = f"{args.dir} is as it was written, but training cannot read all of it"
        raise InputError.from_problems(headline, problems, MOST_NAMED)
    print(printable(f"{args.dir}: every byte is as it was written"))
    return 0


def _info(args: argparse.Namespace) -> int:
    from shardstep.datasets.manifest import open_shards

    shards = open_shards(args.dir)
    manifest, sizes = shards.manifest, shards.sizes
    size = "x".join(map(str, reversed(manifest.image_shape[1:]))) if manifest.image_shape else "of several sizes"
    if sizes is not None:
        height, width = ((sizes[side].min(), sizes[side].max()) for side in ("height", "width"))
        size = f"{height[0]} to {height[1]} pixels high, {width[0]} to {width[1]} wide"
    print(f"samples      {manifest.samples:,} in {count(len(manifest.shards), 'shard')}, {manifest.bytes:,} bytes")
    print(f"images       {size}, {manifest.image_mode}, {'/'.join(manifest.encodings)}")
    print("mean        ", *(f"{value:.4f}" for value in manifest.mean))
    print("std         ", *(f"{value:.4f}" for value in manifest.std))
    print(f"made         {', '.join(f'{key} {value}' for key, value in manifest.made.items())}")
    print(f"fingerprint  {manifest.fingerprint}")
    print(f"classes      {len(manifest.classes)}")
    for name, samples in zip(manifest.classes, manifest.samples_per_class, strict=True):
        print(f"  {samples:>10,}  {printable(name)}")
    return 0


def _index(args: argparse.Namespace) -> int:
    from shardstep.datasets.class_names import doubtful_names_note, parse_class_names
    from shardstep.datasets.manifest import MANIFEST_NAME, parse_manifest
    from shardstep.datasets.scan import index_shards
    from shardstep.datasets.sources.source import WRITTEN_ELSEWHERE
    from shardstep.datasets.tar_labels import NUMBERS_IN_CLS, parse_label_field

    if not args.dir.is_dir():
        raise InputError(f"{args.dir} is not a folder")
    path = args.dir / MANIFEST_NAME
    if path.exists() and not args.force:
        raise InputError(f"{args.dir} already has a {MANIFEST_NAME} to verify its shards against; --force replaces it")
    classes = None if args.classes is None else parse_class_names(args.classes)
    former = None
    if path.exists():
        try:
            former = parse_manifest(path.read_text(errors="replace"), str(path))
        except InputError:
            if classes is None:
                print(f"{path} is damaged: its class names are lost, give them with --classes", file=sys.stderr)
    former_classes = former.classes if former and classes is None else None
    first_label = args.first_label if args.first_label is not None else former.first_label if former else 0
    if first_label < 0:
        raise InputError(f"--first-label {first_label}: labels are integers from 0")
    label = args.label if args.label is not None else former and former.made.get("label_field")
    made = {"source": WRITTEN_ELSEWHERE} | ({"first_label": first_label} if first_label else {})
    made |= {"orientation": args.orientation or (former.orientation if former else "follow")}
    label_field = NUMBERS_IN_CLS if label is None else parse_label_field(str(label))
    manifest = index_shards(args.dir, made, classes, former_classes=former_classes, label_field=label_field)
    print(f"{args.dir}: {_size(manifest)}, {count(len(manifest.classes), 'class', 'classes')}")
    if note := doubtful_names_note(manifest.classes):
        print(note, file=sys.stderr)
    empty = [name for name, n in zip(manifest.classes, manifest.samples_per_class, strict=True) if not n]
    if empty:
        print(f"{args.dir}: {count(len(empty), 'class', 'classes')} without images: {listed(empty)}", file=sys.stderr)
    if former_classes and manifest.classes[: len(former_classes)] != former_classes:
        print(f"{args.dir}: the class names of the old manifest do not fit; they were not kept", file=sys.stderr)
    return 0


def _order(args: argparse.Namespace) -> int:
    from shardstep.datasets.parts import Part
    from shardstep.datasets.training_order import open_strata, open_training_set, training_orders

    if args.lanes < 1 or args.repeats < 1 or args.epoch < 0 or args.seed < 0:
        raise InputError("--lanes and --repeats must be at least 1, --epoch and --seed at least 0")
    config = _data_section(args)
    train = Part(open_training_set(config))
    stop = train.samples if args.count is None else args.start + args.count
    if not 0 <= args.start <= stop <= train.samples:
        raise InputError(f"positions {args.start} to {stop} are outside an epoch of {train.samples} samples")
    order = training_orders(config, train, open_strata(config, train), args.seed).of_epoch(args.epoch)
    for position, sample_id in enumerate(order.slice(args.start, stop).tolist(), args.start):
        print(position, printable(train.shards.key(sample_id)))
    return 0


def _data_section(args: argparse.Namespace) -> "ResolvedDataConfig":
    """Return the data section of a recipe whose order the options of `shards order` describe."""
    import yaml

    from shardstep.configs.resolve import ResolvedDataConfig
    from shardstep.configs.selection import selection_problems

    if args.window_shards.isdecimal() and int(args.window_shards) > 0:
        args.window_shards = int(args.window_shards)
    elif args.window_shards not in ("auto", "all"):
        raise InputError(f"--window-shards {args.window_shards}: write a number from 1, all, or auto")
    try:
        weights = [float(weight) for weight in args.weights.split(",")] if args.weights else [1.0] * len(args.dir)
        sampling = yaml.safe_load(args.sampling)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"--weights or --sampling cannot be read: {' '.join(str(error).split())}") from None
    if args.weights and len(args.dir) == 1:
        raise InputError(f"--weights {args.weights} has no effect on one folder")
    if len(weights) != len(args.dir):
        raise InputError(f"--weights has {count(len(weights), 'number')} for {count(len(args.dir), 'folder')}")
    mix = [{"dir": folder, "weight": weight} for folder, weight in zip(args.dir, weights, strict=True)]
    config = ResolvedDataConfig(
        **({"train": args.dir[0]} if len(mix) == 1 else {"mix": mix}),
        sampling=sampling,
        repeats=args.repeats,
        lanes=args.lanes,
        window_shards=args.window_shards,
        order_version=args.order_version,
    )
    problems = selection_problems(config)
    if problems:
        raise InputError.from_problems("shardstep shards order", problems)
    return config


def _look(args: argparse.Namespace) -> int:
    if args.epoch < 0 or args.start < 0:
        raise InputError("--epoch and --start must be at least 0")
    if args.count is not None and not 1 <= args.count <= _MOST_IN_GRID:
        raise InputError(f"--count={args.count}: draw 1 to {_MOST_IN_GRID} images")
    loaded = load_recipe(args.recipe, args.overrides)

    from shardstep.configs.resolve import with_keys
    from shardstep.trainer.analysis.seen_images import see_images
    from shardstep.trainer.distributed.world import start_world
    from shardstep.trainer.monitoring.pictures import check_picture, draw_seen_images, label_texts, undrawable
    from shardstep.trainer.validate_recipe import validate_recipe

    check_picture("--grid", args.grid)
    recipe = validate_recipe(loaded)
    for note in loaded.notes:
        print(printable(note), file=sys.stderr)
    world = start_world(with_keys(recipe, train={"world_size": None}).train)
    seen = see_images(world, recipe, str(args.dir), args.epoch, args.start, args.count, _IN_GRID)
    draw_seen_images(seen.trained, seen.evaluated, seen.labels, seen.positions, args.epoch, args.grid)
    for position, key, labels in zip(seen.positions, seen.keys, seen.labels, strict=True):
        print(position, printable(key), ", ".join(label_texts(labels)))
    boxes = undrawable(printable(name) for labels in seen.labels for name in labels)
    if boxes:
        print(f"no font of this machine has {boxes[:20]}: they are drawn as boxes", file=sys.stderr)
    print(printable(f"{args.grid}: {count(len(seen.keys), 'image')}"), file=sys.stderr)
    return 0


def _size(manifest: "Manifest") -> str:
    return f"{count(manifest.samples, 'image')} in {count(len(manifest.shards), 'shard')}"


if __name__ == "__main__":
    run_script(main)
