"""Code that breaks its contract is refused before a run begins, with the contract; a mistake in it keeps its own frames."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.own_code import write_code
from tests.runs import failure_of, write_recipe

BROKEN = """
    import random

    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional

    GENERATOR = np.random.default_rng(0)

    def linear(features, num_classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(features, num_classes))

    def more_classes(image_shape, num_classes):
        return linear(3 * 32 * 32, num_classes + 1)

    class Shaped(nn.Module):
        def __init__(self, inner, shape):
            super().__init__()
            self.inner, self.shape = inner, shape

        def forward(self, images):
            return self.shape(self.inner(images))

    def one_number(image_shape, num_classes):
        return Shaped(linear(3 * 32 * 32, num_classes), torch.sum)

    def a_tuple(image_shape, num_classes):
        return Shaped(linear(3 * 32 * 32, num_classes), lambda logits: (logits, logits))

    def classes_of_images(image_shape, num_classes):
        return Shaped(linear(3 * 32 * 32, num_classes), lambda logits: logits.argmax(dim=1))

    def no_module(image_shape, num_classes):
        return torch.sum

    def no_features(image_shape, num_classes):
        return linear(5, num_classes)

    def stumbles(image_shape, num_classes):
        def shape(logits):
            hidden = logits[:, :3]
            return hidden @ torch.zeros(4, 4)
        return Shaped(linear(3 * 32 * 32, num_classes), shape)

    def divides(image_shape, num_classes, *, width: int = 3):
        return width / 0

    def takes_too_little(image_shape):
        return None

    def refuses(image_shape, num_classes, *, width: int = 4):
        from shardstep.configs.errors import InputError

        raise InputError(f"model.width={width} must be odd")

    def named_like_ours(image_shape, num_classes, *, pretrained: bool = True):
        return linear(5, num_classes)

    def no_empty_batch(image_shape, num_classes):
        return Shaped(linear(3 * 32 * 32, num_classes), lambda logits: logits.view(len(logits), -1))

    def mean(outputs, labels):
        return functional.cross_entropy(outputs, labels)

    def total(outputs, labels):
        return functional.cross_entropy(outputs, labels, reduction="sum")

    def mean_for_each(outputs, labels):
        return functional.cross_entropy(outputs, labels).expand(len(labels))

    def by_class(outputs, labels):
        return functional.binary_cross_entropy_with_logits(outputs, torch.zeros_like(outputs), reduction="none")

    def squeezed(outputs, labels):
        return functional.cross_entropy(outputs, labels, reduction="none").squeeze()

    def without_gradient(outputs, labels):
        return functional.cross_entropy(outputs.detach(), labels, reduction="none")

    def unknown_name(outputs, labels, *, power: float = 2.0):
        return outputs.pow(power) + undefined

    def to_float(images, draws):
        return images.float()

    def to_int(images, draws):
        return images.int()

    def cut(images, draws):
        return images[:, 1:]

    def channels_first(images, draws):
        return images.permute(0, 3, 1, 2)

    def nothing(images, draws):
        images.clamp_(10)

    def of_torch(images, draws):
        return images if torch.rand(1) < 2 else images

    def of_numpy(images, draws):
        return images if np.random.rand() < 2 else images

    def of_random(images, draws):
        return images if random.random() < 2 else images

    def of_its_own(images, draws):
        return images.bitwise_xor(torch.from_numpy(GENERATOR.integers(0, 255, (len(images), 1, 1, 1), dtype=np.uint8)))

    def of_the_batch(images, draws):
        return (images.float() - images.float().mean()).abs().to(torch.uint8)

    def words(clock):
        return "fast"

    def infinite(clock):
        return float("inf")

    def counting(clock, *, calls: list = []):
        calls.append(1)
        return float(len(calls))

    def returning(slow, fast, share_done, *, every: str = "1 steps"):
        return slow

    def never_due(slow, fast, share_done):
        return None

    def without_lr(parameters, *, rate: float = 0.1):
        return torch.optim.SGD(parameters, lr=rate)

    def no_optimizer(parameters, *, lr: float = 0.1):
        return None

    class Outside(torch.optim.Optimizer):
        def __init__(self, parameters, *, lr: float = 0.1):
            super().__init__(parameters, {"lr": lr})
            self.steps = 0

        @torch.no_grad()
        def step(self, closure=None):
            self.steps += 1
            for group in self.param_groups:
                for value in group["params"]:
                    value.sub_(group["lr"] / self.steps * value.grad)
"""
MODEL, LOSS = "and returns logits, float (B, classes)", "returns one loss for each sample, float (B,)"
TRANSFORM, DRAWS = "returns images of the same type and shape", "takes random numbers from its argument draws alone"
SCHEDULE = "returns the factor on the learning rate, a finite number"
CASES: list[tuple[list[str], int, list[str]]] = [
    (["model.name=broken.py:more_classes"], 2, ["returned float32 (2, 11) for images float32 (2, 3, 32, 32)", MODEL]),
    (["model.name=broken.py:one_number"], 2, ["returned float32 () for", MODEL]),
    (["model.name=broken.py:a_tuple"], 2, ["returned a tuple for", MODEL]),
    (["model.name=broken.py:classes_of_images"], 2, ["returned int64 (2,) for", MODEL]),
    (["model.name=broken.py:no_module"], 2, ["returns a torch.nn.Module"]),
    (["model.name=broken.py:no_features"], 1, ["no_features(float32 (2, 3, 32, 32)) raised RuntimeError"]),
    (["model.name=broken.py:stumbles"], 1, ["Shaped(float32 (2, 3, 32, 32)) raised", "in shape\n", "in forward\n"]),
    (["model.name=broken.py:divides"], 1, ["divides((3, 32, 32), 10, width=3) raised ZeroDivisionError", "in divides\n"]),
    (["model.name=broken.py:takes_too_little"], 1, ["takes_too_little((3, 32, 32), 10) raised TypeError"]),
    (["model.name=broken.py:refuses"], 2, ["model.width=4 must be odd"]),
    (["model.name=broken.py:named_like_ours"], 1, ["named_like_ours(float32 (2, 3, 32, 32)) raised RuntimeError"]),
    (["model.name=broken.py:divides", "model.width=x"], 2, ["model.width: Value 'x'"]),
    (["model.name=broken.py:divides", "model.widht=4"], 2, ["model.widht is not an option of", "did you mean width?"]),
    (["loss.name=broken.py:mean"], 2, ["returned float32 () for outputs float32 (16, 10) and labels int64 (16,)", LOSS]),
    (["loss.name=broken.py:total"], 2, ["returned float32 () for", LOSS]),
    (["loss.name=broken.py:mean_for_each"], 2, ["another loss for a sample alone than beside others", LOSS]),
    (["loss.name=broken.py:by_class"], 2, ["returned float32 (16, 10) for", LOSS]),
    (["loss.name=broken.py:squeezed"], 2, ["returned float32 () for one sample", LOSS]),
    (["loss.name=broken.py:without_gradient"], 2, ["without a gradient", LOSS]),
    (["loss.name=broken.py:unknown_name"], 1, ["unknown_name(float32 (16, 10), int64 (16,), power=2.0) raised NameError"]),
    (["data.augment=[broken.py:to_float]"], 2, ["returned float32 (16, 32, 32, 3) for images uint8", TRANSFORM]),
    (["data.augment=[broken.py:to_int]"], 2, ["returned int32 (16, 32, 32, 3)", TRANSFORM]),
    (["data.augment=[flip,broken.py:cut]"], 2, ["returned uint8 (16, 31, 32, 3)", TRANSFORM]),
    (["data.augment=[broken.py:channels_first]"], 2, ["returned uint8 (16, 3, 32, 32)", TRANSFORM]),
    (["data.augment=[broken.py:nothing]"], 2, ["returned a NoneType", TRANSFORM]),
    (["data.augment=[broken.py:of_torch]"], 2, ["draws from the global generator of torch", DRAWS]),
    (["data.augment=[broken.py:of_numpy]"], 2, ["draws from the global generator of numpy", DRAWS]),
    (["data.augment=[broken.py:of_random]"], 2, ["draws from the global generator of random", DRAWS]),
    (["data.augment=[broken.py:of_its_own]"], 2, ["other images for the same images and draws", DRAWS]),
    (["data.augment=[broken.py:of_the_batch]"], 2, ["another image for one alone than beside others", TRANSFORM]),
    (["schedule.name=broken.py:words"], 2, ["returned 'fast' at 0% of the run", SCHEDULE]),
    (["schedule.name=broken.py:infinite"], 2, ["returned inf", SCHEDULE]),
    (["schedule.name=broken.py:counting"], 2, ["returned '1.0, then 2.0'", "without keeping any state"]),
    (["average.name=broken.py:returning"], 2, ["returned a list", "changes the tensors of slow in place"]),
    (["average.name=broken.py:never_due"], 2, ["needs the option every: str = '1 steps'"]),
    (["optimizer.name=broken.py:without_lr"], 2, ["has no option lr"]),
    (["optimizer.name=broken.py:no_optimizer"], 2, ["returned NoneType", "returns a torch.optim.Optimizer"]),
    (["optimizer.name=broken.py:Outside"], 2, ["differs after its state was saved and loaded", "self.state"]),
    (["optimizer.groups=[{ndim: 2, name: 'broken.py:Outside', lr: 0.1}]"], 2, ["after its state was saved and loaded"]),
    (["model.name=syntax.py:net"], 1, ["importing", "syntax.py raised SyntaxError", "def net(:"]),
    (["model.name=absent.py:net"], 1, ["raised ModuleNotFoundError", "absent.py", "No module named 'nothing_here'"]),
    (["model.name=nowhere.py:net", "loss.name=no.where:f"], 2, ["2 problems", "no file nowhere.py", "no module no.where"]),
]  # fmt: skip


def try_all(recipe: str, cases: list[list[str]]) -> list[tuple[int, str, str]]:
    return [failure_of(recipe, *overrides) for overrides in cases]


@pytest.fixture(scope="module")
def broken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    absent = "import nothing_here\n"
    write_code(folder, broken=BROKEN, syntax="def net(:\n", absent=absent)
    return write_recipe(folder, shards)


@pytest.fixture(scope="module")
def outcomes(broken: Path) -> dict[str, tuple[int, str, str]]:
    (found,) = run_ranks(1, try_all, str(broken), [overrides for overrides, _, _ in CASES])
    return {" ".join(overrides): one for (overrides, _, _), one in zip(CASES, found, strict=True)}


@pytest.mark.parametrize(("overrides", "code", "messages"), CASES, ids=lambda value: str(value)[:60])
def test_what_breaks_its_contract(
    overrides: list[str], code: int, messages: list[str], outcomes: dict[str, Any], broken: Path
) -> None:
    found, _, err = outcomes[" ".join(overrides)]
    assert found == code, err
    assert all(message in err for message in messages), err
    assert any(line.startswith("failed: " if code == 1 else "error: ") for line in err.splitlines()), err
    if code == 1:
        files = {line.split('"')[1] for line in err.splitlines() if line.startswith('  File "')}
        assert all(Path(file).parent == broken.parent for file in files), err
    else:
        assert "Traceback" not in err
    assert not (broken.parent / "run").exists()


@pytest.mark.parametrize(
    ("ranks", "batch", "refused"),
    [(1, 50, False), (2, 50, True), (2, 51, False)],  # 101 samples: the last batch has 1 sample, or 50 of 101
)
def test_an_empty_batch_is_tried_where_a_rank_can_get_one(
    ranks: int, batch: int, refused: bool, broken: Path, tmp_path: Path
) -> None:
    overrides = ["model.name=broken.py:no_empty_batch", f"train.global_batch_size={batch}", "train.duration=1 steps"]
    results = run_ranks(ranks, failure_of, str(broken), *overrides, f"run.dir={tmp_path / 'run'}")
    assert {code for code, _, _ in results} == {2 if refused else 0}
    assert ("use flatten(1) rather than view(B, -1)" in results[0][2]) == refused


def test_a_mistake_of_one_rank_is_told_by_it(broken: Path, tmp_path: Path) -> None:
    text = """
        import os
        from torch import nn

        def net(image_shape, num_classes):
            if os.environ["RANK"] == "1":
                raise KeyError("width")
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
    """
    write_code(broken.parent, lame=text)
    results = run_ranks(2, failure_of, str(broken), "model.name=lame.py:net", f"run.dir={tmp_path / 'run'}")
    codes, errors = [code for code, _, _ in results], [err for _, _, err in results]
    assert codes == [1, 1]
    assert "failed: rank 1: model.name=" in errors[1]
    assert "KeyError: 'width'" in errors[1]
    assert "rank 0 ends because another rank has ended" in errors[0]
