from pathlib import Path

import pytest

from shardstep.configs.errors import InputError
from shardstep.configs.load import LoadedRecipe, load_recipe, recipe_names, save_recipe
from shardstep.configs.schema import Recipe
from shardstep.trainer.validate_recipe import validate_recipe


def load(tmp_path: Path, text: str, *overrides: str) -> LoadedRecipe:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_recipe(str(path), overrides)


MINIMAL = "model: {name: mlp}\noptimizer: {name: adam, lr: 0.01, betas: [0.8, 0.9]}\n"


def problems_of(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        validate_recipe(load(tmp_path, text, *overrides))
    return str(caught.value)


def test_name_and_folder_come_from_the_file(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL).recipe
    assert (recipe.run.name, recipe.run.dir) == ("mine", "runs/mine")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("null", "cifar10"), ("cifar10", "cifar10"), ("digits", "digits"), ("synthetic:320", "synthetic-320"),
        ("/tmp/my images/", "my images"), ("/tmp/mine.v2.tar.gz", "mine.v2"), ("../mine.tar", "mine"),
    ],
)  # fmt: skip
def test_a_source_has_a_folder_of_its_own(source: str, name: str, tmp_path: Path) -> None:
    data = load(tmp_path, MINIMAL, f"data.source={source}").recipe.data
    assert (data.train, data.test) == (f"data/{name}/train", f"data/{name}/test")
    data = load(tmp_path, MINIMAL, f"data.source={source}", "data.train=elsewhere").recipe.data
    assert (data.train, data.test) == ("elsewhere", f"data/{name}/test")


def test_overrides(tmp_path: Path) -> None:
    overrides = [
        "optimizer.lr=1e-3",
        "data.augment=[flip, {name: translate, pixels: 2}]",
        "train.global_batch_size=full",
        "run.name=007",
        "model.hidden=[8,8]",
        "data.normalize={mean: [0.5], std: [0.25]}",
    ]
    recipe = validate_recipe(load(tmp_path, MINIMAL, *overrides))
    assert recipe.optimizer["lr"] == 0.001
    assert recipe.data.augment == [{"name": "flip", "probability": 0.5}, {"name": "translate", "pixels": 2}]
    assert recipe.train.global_batch_size == "full"
    assert recipe.run.name == "007"
    assert recipe.model["hidden"] == [8, 8]


def test_a_new_name_drops_the_old_ones_options_and_says_so(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL, "optimizer.momentum=0.9", "optimizer.name=sgd")
    recipe = validate_recipe(loaded)
    assert recipe.optimizer["lr"] == 0.001  # torch's default for SGD, not the 0.01 that was meant for Adam
    assert recipe.optimizer["momentum"] == 0.9
    assert loaded.notes == ["optimizer.name=sgd replaces adam: its lr=0.01, betas=[0.8, 0.9] no longer apply"]


def test_the_same_name_keeps_the_options(tmp_path: Path) -> None:
    recipe = validate_recipe(load(tmp_path, MINIMAL, "optimizer.name=adam"))
    assert recipe.optimizer["lr"] == 0.01


def test_all_problems_at_once(tmp_path: Path) -> None:
    message = problems_of(
        tmp_path,
        MINIMAL + "train: {durration: 3 epochs}\nfoo: {a: 1}\n",
        "optimizer.lrr=1",
        "train.precision=fp17",
        "data.workers=many",
        "model.name=mlpp",
        "nonsense",
        "eval.every=2",
    )
    for expected in (
        "train.durration is not a key; did you mean duration?",
        "foo is not a section",
        "optimizer.lrr is not an option of adam; did you mean lr",
        "train.precision",
        "data.workers",
        "model.name=mlpp is unknown; did you mean mlp?",
        "'nonsense' is not of the form section.key=value",
        "eval.every: '2' is not a duration",
    ):
        assert expected in message, message
    assert "8 problems" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.global_batch_size=0", "train.global_batch_size=0 must be a whole number from 1, or full"),
        ("train.global_batch_size=half", "train.global_batch_size=half must be"),
        ("data.window_shards=0", "data.window_shards=0 must be"),
        ("data.lanes=0", "data.lanes=0 must be at least 1"),
        ("data.resize=100000", "data.resize=100000 must be at most"),
        ("run.name=../outside", "run.name='../outside' must be a name within runs/"),
        ("run.name=/tmp/outside", "run.name='/tmp/outside' must be a name within runs/"),
        ("run.name=a\nb", "run.name='a\\nb' must be a name within runs/"),
        ("train.clip_norm=0", "train.clip_norm=0.0 must be above 0"),
        ("data.normalize=foo", "data.normalize=foo must be"),
        ("data.normalize={mean: [1, 2], std: [1, 2]}", "mean and std must both have 1 or 3 numbers"),
        ("data.normalize={mean: [0], std: [0]}", "every std finite and above 0"),
        ("data.augment=flip", "data.augment: flip is not a list: write [flip]"),
        ("model.hidden=64", "model.hidden: 64 is not a list: write [64]"),
        ("data.augment=[flop]", "data.augment[0].name=flop is unknown; did you mean flip?"),
        ("data.augment=[{name: translate, pixel: 3}]", "pixel is not an option of translate; did you mean pixels?"),
        ("data.augment=[flip, alternating_flip]", "flip undoes"),
        ("data.augment=[mixup, flip]", "data.augment: mixup must come last"),
        ("data.augment=[mixup, flip, cutmix]", "mixup and cutmix must come last"),
        ("data.augment=[flip, mixup, mixup]", "data.augment: mixup can be listed only once"),
        ("data.augment=[flip, {name: mixup, alpha: 0}]", "data.augment[1].alpha=0.0 must be above 0"),
        ("data.augment=[{name: cutmix, alpha: 1e9}]", "data.augment[0].alpha=1000000000.0 must be above 0 and at most"),
        (
            "data.augment=[{name: erasing, scale: [0.3, 0.1]}]",
            "augment[0].scale=[0.3, 0.1] must be two numbers above 0",
        ),
        ("data.augment=[{name: erasing, scale: [0.1, 1.5]}]", "above 0 and at most 1, the smaller one first"),
        ("data.augment=[{name: erasing, scale: 0.1}]", "data.augment[0].scale"),
        ("data.augment=[{name: erasing, ratio: [0, 2]}]", "augment[0].ratio=[0.0, 2.0] must be two numbers above 0"),
        ("data.augment=[{name: blur, sigma: [0, 2]}]", "augment[0].sigma=[0.0, 2.0] must be two numbers above 0"),
        ("data.augment=[{name: blur, kernel_size: 4}]", "kernel_size=4 must be an odd number of pixels"),
        ("data.augment=[{name: blur, kernel_size: -3}]", "kernel_size=-3 must be an odd number of pixels"),
        ("data.augment=[{name: color_jitter, hue: 0.6}]", "hue: 0.6 must be at least 0 and at most 0.5"),
        ("data.augment=[{name: randaugment, magnitude: 31}]", "magnitude: 31 must be at least 0 and at most 30"),
        ("data.augment=[{name: randaugment, num_ops: 0}]", "num_ops: 0 must be at least 1"),
        ("data.augment=[{name: random_crop, padding: -1}]", "padding: -1 must be at least 0"),
        ("data.augment=[{name: random_crop, padding_mode: edge}]", "data.augment[0].padding_mode"),
        ("data.augment=[{name: rotate, degrees: 200}]", "degrees: 200.0 must be at least 0 and at most 180"),
        ("optimizer.name=lbfgs", "cannot work here"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("optimizer.groups=[{lr: 1}]", "must be a mapping with match"),
        ("optimizer.groups=[{match: x, momentun: 1}]", "momentun is not an option of adam"),
        ("schedule.name=step", "schedule.every is missing: step needs it"),
        ("schedule.warmup=5", "schedule.warmup: '5' is not a duration"),
        ("schedule.warmup_start=0.5", "no effect without schedule.warmup"),
        ("loss.name=nll", "loss.label_smoothing is not an option of nll"),
        ("model.hidden=abc", "model.hidden"),
        ("log.every=0 steps", "must be longer than 0"),
    ],
)
def test_bad_values(tmp_path: Path, override: str, expected: str) -> None:
    extra = "loss.label_smoothing=0.1" if override == "loss.name=nll" else "run.seed=1"
    assert expected in problems_of(tmp_path, MINIMAL, override, extra)


def test_an_image_alone_has_no_partner(tmp_path: Path) -> None:
    found = problems_of(tmp_path, MINIMAL, "data.augment=[flip, cutmix]", "train.global_batch_size=1")
    assert "data.augment: cutmix has no effect with train.global_batch_size=1" in found


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=.nan",
        "optimizer.lr=-1",
        "optimizer.groups=[{match: '*', lr: abc}]",
        "optimizer.groups=[{match: [1], lr: 1}]",
        "optimizer.groups=[3]",
        "optimizer.decay_biases_and_norms=true",
        "schedule.warmup_start=abc",
        "loss.label_smoothing=2",
        "model.hidden=[-1]",
        "model.hidden={a: 1}",
        "model.name=${bad",
        "model.sync_batch_norm=abc",
        "data.augment=[{name: {a: 1}}]",
        "data.augment=[{name: flip, 3: 4}]",
        "data.augment=[{name: translate, pixels: -3}]",
        "data.augment=[{name: flip, probability: .nan}]",
        "data.normalize={mean: [.nan], std: [.inf]}",
        "train.timeout_s=.inf",
        "run.seed=10000000000000000000000",
        "data.train=s3://bucket/x",
        "train.duration=.nan",
        "optimizer.betas={a: 1}",
    ],
)
def test_hostile_values_are_problems_and_no_tracebacks(tmp_path: Path, override: str) -> None:
    assert override.split("=")[0].split(".")[0] in problems_of(tmp_path, MINIMAL, override)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "[1]",
        "model: 3",
        "model: {1: 2, name: mlp}",
        "model: {name: [mlp]}",
        "optimizer: {name: {a: 1}}",
        "data:",
        "run: []",
        "model: {hidden: [8]}",
        "train: {1: 2}",
        "model: {name: mlp}\noptimizer: {name: adam, lr: ${nowhere}}",
    ],
)
def test_hostile_recipes_are_problems_and_no_tracebacks(tmp_path: Path, text: str) -> None:
    problems_of(tmp_path, text, "optimizer.name=sgd") if "model" in text else problems_of(tmp_path, text)


def test_a_run_with_a_folder_may_have_any_name(tmp_path: Path) -> None:
    assert validate_recipe(load(tmp_path, MINIMAL, "run.name=../b ", "run.dir=elsewhere")).run.name == "../b "


def test_clip_norm_and_value_exclude_each_other(tmp_path: Path) -> None:
    assert "exclude each other" in problems_of(tmp_path, MINIMAL, "train.clip_norm=1", "train.clip_value=1")


@pytest.mark.parametrize("key", ["labels", "image_column", "label_column"])
def test_labels_belong_to_a_source(tmp_path: Path, key: str) -> None:
    override = f"data.{key}=x"
    assert f"{override} has no effect without data.source" in problems_of(tmp_path, MINIMAL, override)
    assert validate_recipe(load(tmp_path, MINIMAL, override, "data.source=y")).data.source == "y"


@pytest.mark.parametrize(
    "source", ["x/photos", "photos/", "photos.tar", "photos.tar.gz", "photos.parquet", "/x/photos.npz"]
)
def test_data_folders_are_named_after_the_source(tmp_path: Path, source: str) -> None:
    assert load(tmp_path, MINIMAL, f"data.source={source}").recipe.data.test == "data/photos/test"


def test_unknown_recipe_names_its_neighbours() -> None:
    with pytest.raises(InputError, match="did you mean quickstart"):
        load_recipe("quikstart")


def test_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as YAML"):
        load(tmp_path, "model: {name: [")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_survives_a_round_trip(tmp_path: Path, name: str) -> None:
    recipe: Recipe = validate_recipe(load_recipe(name))
    save_recipe(recipe, tmp_path / "config.yaml")
    again = validate_recipe(load_recipe(str(tmp_path / "config.yaml")))
    assert again == recipe


def test_every_key_is_documented() -> None:
    # A field's docstring is a string literal below it, which only the source still has.
    import ast
    import inspect

    from shardstep.configs import schema

    source = inspect.getsource(schema)
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name != "Recipe":
            body = node.body[1:]
            for field, text in zip(body[::2], body[1::2], strict=True):
                assert isinstance(field, ast.AnnAssign)
                assert isinstance(text, ast.Expr)
                assert len(ast.get_source_segment(source, text).splitlines()) <= 3, ast.unparse(field)


DEVICES = """
model: {name: mlp}
optimizer: {name: sgd, lr: 0.1, momentum: 0.9}
train: {global_batch_size: 500}
on_cpu:
  train: {global_batch_size: 250}
  optimizer: {lr: 0.2}
on_cuda:
  optimizer: {name: adam}
"""


def test_what_counts_on_one_kind_of_device(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(DEVICES)
    loaded = load_recipe(str(tmp_path / "recipe.yaml"), ["train.duration=1 epochs"])
    assert loaded.recipe.train.global_batch_size == 500
    assert loaded.for_device
    cpu, cuda = (loaded.for_device(device).recipe for device in ("cpu", "cuda"))
    assert (cpu.train.global_batch_size, cuda.train.global_batch_size) == (250, 500)
    assert cpu.optimizer == {"name": "sgd", "lr": 0.2, "momentum": 0.9}
    assert cuda.optimizer == {"name": "adam"}  # another name keeps nothing of the old one
    assert cpu.train.duration == cuda.train.duration == "1 epochs"
    given = load_recipe(str(tmp_path / "recipe.yaml"), ["train.global_batch_size=7"])
    assert given.for_device
    assert given.for_device("cpu").recipe.train.global_batch_size == 7


def test_mistakes_are_found_whatever_the_device_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        DEVICES.replace("{global_batch_size: 250}", "{global_batch_sizes: 250}") + "  trian: {duration: 1 epochs}\n"
    )
    assert load_recipe(str(tmp_path / "recipe.yaml")).problems == [
        "on_cpu: train.global_batch_sizes is not a key; did you mean global_batch_size?",
        "on_cuda: trian is not a section; did you mean train?",
    ]
