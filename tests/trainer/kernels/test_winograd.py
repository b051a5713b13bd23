"""Winograd's method computes what the convolution does, and is used in training where it is faster."""

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from shardstep.trainer.kernels import winograd
from shardstep.trainer.kernels.convolutions import convert_convolutions, gains
from tests.distributed import run_ranks
from tests.runs import failure_of, train_lines, train_ranks, write_recipe


def _gradients(outputs: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return torch.autograd.grad(outputs, of, torch.randn(outputs.shape, generator=generator).to(outputs.dtype))


def _distance(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    ("count", "height", "width"), [(3, 7, 7), (5, 15, 6), (1, 3, 3), (2, 4, 9), (4, 12, 5), (1, 8, 16)]
)
@pytest.mark.parametrize("channels", [(5, 6), (40, 70)])
def test_outputs_and_gradients_are_those_of_the_convolution(
    channels: tuple[int, int], count: int, height: int, width: int, padding: int, dtype: torch.dtype, close: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    inputs, outputs = channels
    part_bytes = 2 * 2 * 36 * 4 * (inputs + outputs)  # few images at once: several parts
    monkeypatch.setattr(winograd, "_part_bytes", lambda: part_bytes)
    torch.manual_seed(0)
    images = torch.randn(count, inputs, height, width).to(memory_format=torch.channels_last)
    own = [
        part.to(dtype).requires_grad_() for part in (images, torch.randn(outputs, inputs, 3, 3), torch.randn(outputs))
    ]
    exact = [part.detach().double().requires_grad_() for part in own]
    found = winograd.convolve(own[0], own[1], own[2], padding)
    wanted = functional.conv2d(*exact, padding=padding)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert _distance(found, wanted) < close
    for gradient, right in zip(_gradients(found, *own), _gradients(wanted, *exact), strict=True):
        assert gradient.dtype == dtype
        assert _distance(gradient, right) < close


def test_many_parts_are_as_exact_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = torch.randn(200, 32, 4, 4).bfloat16()
    own = [part.bfloat16().requires_grad_() for part in (torch.randn(32, 32, 3, 3), torch.randn(32))]
    exact = [part.detach().double().requires_grad_() for part in own]
    wanted = _gradients(functional.conv2d(images.double(), *exact, padding=1), *exact)
    distances = []
    for images_at_once in (200, 1):
        monkeypatch.setattr(winograd, "_part_bytes", lambda images=images_at_once: images * 2 * 36 * 64)
        found = _gradients(winograd.convolve(images, own[0], own[1], 1), *own)
        distances.append([_distance(*pair) for pair in zip(found, wanted, strict=True)])
    assert all(many < 1.3 * one for one, many in zip(*distances, strict=True))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("channels", [24, 64])
def test_rectified_outputs_have_the_gradients_of_a_relu(channels: int, dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(0)
    shapes = (3, channels, 9, 8), (channels, channels, 3, 3), (channels,)
    own = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    found = winograd.convolve(own[0], own[1], own[2], 1, rectify=True)
    wanted = functional.relu(winograd.convolve(own[0], own[1], own[2], 1))
    assert torch.equal(found, wanted)
    assert 0.4 < (found == 0).float().mean() < 0.6
    for gradient, right in zip(_gradients(found, *own), _gradients(wanted, *own), strict=True):
        assert _distance(gradient, right.double()) < close


@pytest.mark.parametrize("rectify", [False, True])
def test_numbers_that_are_none_stay_none(rectify: bool) -> None:
    images, weight = torch.randn(1, 32, 8, 8).bfloat16(), torch.randn(32, 32, 3, 3).bfloat16()
    images[0, 3, 0, 0] = float("nan")
    outputs = winograd.convolve(images, weight, None, 1, rectify)
    assert outputs[0, :, :4, :4].isnan().all()
    assert not outputs[0, :, 4:, 4:].isnan().any()


def test_sums_of_a_part_do_not_depend_on_the_number_of_threads() -> None:
    images, weight = torch.randn(9, 7, 7, 40), torch.randn(40, 3, 3, 40)
    grid, before, found = winograd._Grid(1, 2, 2, 9), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            tiles = winograd._transform("inputs", images, grid)
            filter_tiles = winograd._transform("filters", weight, winograd._ONE_TILE)
            of_gradient, sums = winograd._transform_gradient(images, images, grid, with_sums=True)
            collected = [torch.zeros_like(images), torch.zeros_like(images), torch.zeros_like(weight)]
            winograd._collect("inputs", tiles, collected[0], grid)
            winograd._collect("outputs", of_gradient, collected[1], grid)
            winograd._collect("filters", filter_tiles, collected[2], winograd._ONE_TILE)
            found.append([tiles, filter_tiles, of_gradient, sums, *collected])
    finally:
        torch.set_num_threads(before)
    for several in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], several, strict=True))


def test_parts_grow_with_the_caches_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 to 128 channels and of 256 to 512, whose images have tiles of 36 * 49 * 256 and 36 * 4 * 768 floats."""
    before, megabytes, images = torch.get_num_threads(), [], []
    layers = [
        (torch.empty(1, 26, 26, 128), torch.empty(36, 128, 128)),
        (torch.empty(1, 7, 7, 512), torch.empty(36, 512, 256)),
    ]
    try:
        for cache_megabytes, threads in [(0, 1), (1, 1), (1, 2), (2, 2), (2, 64)]:
            monkeypatch.setattr(winograd.machine, "level_2_cache_bytes", lambda size=cache_megabytes: size << 20)
            winograd._cache_bytes.cache_clear()
            torch.set_num_threads(threads)
            megabytes.append(winograd._part_bytes() >> 20)
            images.append([winograd._Grid.of(*layer, 0).images for layer in layers])
    finally:
        torch.set_num_threads(before)
        winograd._cache_bytes.cache_clear()
    assert megabytes == [2, 2, 4, 8, 256]
    assert images == [[1, 37], [1, 37], [2, 75], [4, 151], [37, 151]]  # never more than 64 MB


def test_a_row_beyond_the_tiles_of_images_is_zero() -> None:
    grid = winograd._Grid(padding=0, down=2, right=2, images=1)
    images = torch.ones(3, 6, 6, 5)
    tiles = winograd._transform("inputs", images, grid)
    of_gradient, sums = winograd._transform_gradient(images, None, grid, with_sums=True)
    assert sums is not None
    assert tiles.shape == of_gradient.shape == (36, 13, 5)
    assert winograd._Grid(padding=0, down=3, right=3, images=1).rows(3) == 27  # odd by themselves
    assert not any(part[..., 12, :].any() for part in (tiles, of_gradient, sums))
    assert tiles[..., 11, :].any()


@pytest.mark.parametrize("in_forward", [True, False])
def test_autocast_elsewhere_changes_nothing(in_forward: bool) -> None:
    """Tiles have the format of the images, whatever autocast's format is."""
    torch.manual_seed(0)
    images, weight = torch.randn(2, 32, 8, 8), torch.randn(32, 32, 3, 3, requires_grad=True)
    wanted = _gradients(winograd.convolve(images, weight, None, 1), weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_forward):
        outputs = winograd.convolve(images, weight, None, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=not in_forward):
        found = _gradients(outputs, weight)
    assert torch.equal(found[0], wanted[0])


def test_what_c_cannot_read_is_refused() -> None:
    images, weight = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3)
    for given in [
        (images.double(), weight.double(), None),
        (images.half(), weight.half(), None),
        (images, weight.bfloat16(), None),
        (images, weight, torch.randn(32).bfloat16()),
        (images.to("meta"), weight.to("meta"), None),
    ]:
        with pytest.raises(ValueError, match="on the CPU, all of fp32 or all of bf16"):
            winograd.convolve(*given, 1)


def test_what_needs_no_gradient_gets_none() -> None:
    images, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3, requires_grad=True)
    winograd.convolve(images, weight, None, 1).sum().backward()
    assert images.grad is None
    assert weight.grad is not None
    images, weight = images.requires_grad_(), weight.detach()
    winograd.convolve(images, weight, None, 1).sum().backward()
    assert images.grad is not None
    assert weight.grad is None


def test_sums_are_fp32_whatever_the_default_is() -> None:
    own = [torch.randn(2, 24, 7, 7), torch.randn(24, 24, 3, 3), torch.randn(24)]
    own = [part.requires_grad_() for part in own]
    wanted = _gradients(winograd.convolve(own[0], own[1], own[2], 1, rectify=True), *own)
    torch.set_default_dtype(torch.float64)
    try:
        gradient = torch.randn(2, 24, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
        found = torch.autograd.grad(winograd.convolve(own[0], own[1], own[2], 1, rectify=True), own, gradient)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_rectified_outputs_that_were_changed_have_no_gradient() -> None:
    outputs = winograd.convolve(
        torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3, requires_grad=True), None, 1, rectify=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.mul_(2).sum().backward()


@pytest.mark.parametrize("rectify", [False, True])
def test_no_images_have_no_gradient(rectify: bool) -> None:
    images, weight = torch.randn(0, 4, 6, 6, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    winograd.convolve(images, weight, bias, 1, rectify).sum().backward()
    assert bias.grad is not None
    assert not bias.grad.any()
    assert images.grad is not None
    assert images.grad.shape == images.shape
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_gradient_without_memory_of_its_own_is_taken() -> None:
    images, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    (by_winograd,) = torch.autograd.grad(winograd.convolve(images, weight, None, 1).mean(dim=(2, 3)).sum(), weight)
    (direct,) = torch.autograd.grad(functional.conv2d(images, weight, padding=1).mean(dim=(2, 3)).sum(), weight)
    torch.testing.assert_close(by_winograd, direct, atol=1e-5, rtol=1e-4)


def test_other_convolutions_stay_as_they_are() -> None:
    kept = [
        nn.Conv2d(128, 128, 5, padding=1),
        nn.Conv2d(128, 128, 3, stride=2),
        nn.Conv2d(128, 128, 3, dilation=2),
        nn.Conv2d(128, 128, 3, groups=2),
        nn.Conv2d(128, 128, 3, padding=2),
        nn.Conv2d(128, 128, 3, padding="same"),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
    ]
    model = nn.Sequential(*kept, nn.Conv2d(128, 128, 3))
    names = list(model.state_dict())
    convert_convolutions(model, "winograd")
    assert [type(layer) for layer in model] == [nn.Conv2d] * len(kept) + [winograd.WinogradConv2d]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "faster"),
    [
        (128, 128, 8, True), (256, 256, 7, True), (64, 256, 15, True), (64, 64, 15, True),
        (128, 128, 5, False),  # 36 tiles' worth of work for 25 pixels
        (16, 16, 32, False),  # sums that take longer than what they save
    ],
)  # fmt: skip
def test_it_is_used_where_it_is_faster(
    inputs: int, outputs: int, size: int, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    assert gains(layer, (inputs, size, size), "winograd") == faster
    convert_convolutions(layer, "winograd")
    used = []
    monkeypatch.setattr(
        winograd, "convolve", lambda *given: used.append(given) or functional.conv2d(*given[:3], padding=given[3])
    )
    images = torch.randn(1, inputs, size, size)
    layer(images)
    assert len(used) == faster
    with torch.no_grad():
        layer(images)
    assert len(used) == faster  # an evaluation is torch's


def test_what_it_cannot_do_stays_torchs() -> None:
    layer, plain = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    convert_convolutions(layer, "winograd")
    images = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(layer(input=images), plain(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(images[0]), plain(images[0]))  # without a batch
    with torch.no_grad():
        assert torch.equal(layer(images), plain(images))
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(layer(images), plain(images))
    large = torch.randn(1, 64, 256, 256)
    assert winograd._speedup(layer, large) == 0
    small = torch.randn(1, 64, 2, 2)
    assert winograd._speedup(nn.Conv2d(64, 64, 3), small) == 0  # smaller than the filter
    assert torch.equal(layer.double()(images.double()), plain.double()(images.double()))
    layer.float().requires_grad_(False)
    assert torch.equal(layer(images), plain.float()(images))  # nothing to learn


def test_a_relu_behind_a_layer_is_computed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)  # only the second gains by it
    plain = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(inplace=True), nn.BatchNorm2d(64), nn.ReLU())
    model = copy.deepcopy(plain)
    convert_convolutions(model, "winograd")
    images = torch.randn(2, 3, 8, 8)
    gradients = [torch.autograd.grad(each(images).square().sum(), list(each.parameters())) for each in (plain, model)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain[:3](images), model[:3](images), rtol=1e-5, atol=1e-5)  # ends before the ReLU
    torch.testing.assert_close(plain[2:](first(images)), model[2:](first(images)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), plain.eval()(images))

    assert _relus_called(model.train(), images, monkeypatch) == [model[5]]


def _relus_called(model: nn.Sequential, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    called: list[nn.Module] = []
    relu = nn.ReLU.forward
    with monkeypatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", lambda layer, input: called.append(layer) or relu(layer, input))
        model(images)
    return called


class _Shifted(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1)


@pytest.mark.parametrize("following", [nn.LeakyReLU(), nn.BatchNorm2d(64), nn.GELU(), _Shifted()])
def test_what_is_no_relu_follows_as_it_is(following: nn.Module) -> None:
    plain = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), following)
    model = copy.deepcopy(plain)
    convert_convolutions(model, "winograd")
    images = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("watched", [0, 1])
@pytest.mark.parametrize(
    "watch",
    [
        lambda layer: layer.register_forward_hook(lambda *given: None),
        lambda layer: layer.register_forward_pre_hook(lambda *given: None),
        lambda layer: layer.register_full_backward_hook(lambda *given: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *given: None),
        lambda layer: nn.modules.module.register_module_forward_hook(lambda *given: None),
    ],
)
def test_who_watches_a_layer_sees_what_goes_through(
    watch: Callable[[nn.Module], RemovableHandle], watched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU())
    convert_convolutions(model, "winograd")
    images = torch.randn(2, 32, 8, 8)
    assert _relus_called(model, images, monkeypatch) == []
    handle = watch(model[watched])
    assert _relus_called(model, images, monkeypatch) == [model[1]]
    handle.remove()
    assert _relus_called(model, images, monkeypatch) == []
    own = model[0].forward
    model[0].forward = lambda input: own(input)
    assert _relus_called(model, images, monkeypatch) == [model[1]]


def test_under_autocast_it_computes_in_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *given: used.append(given[0].dtype) or convolve(*given))
    layer, images = nn.Conv2d(64, 64, 3, padding=1), torch.randn(2, 64, 8, 8)
    convert_convolutions(layer, "winograd")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(images)
        assert outputs.dtype == torch.bfloat16
        nn.ReLU(inplace=True)(outputs).float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    assert used == [torch.bfloat16] * 2


def test_without_a_compiler_a_layer_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
    plain.load_state_dict(layer.state_dict())
    convert_convolutions(layer, "winograd")
    monkeypatch.setattr(winograd, "missing", lambda: "a C compiler (there is no cc)")
    images = torch.randn(2, 64, 8, 8)
    assert torch.equal(layer(images), plain(images))


def test_gradients_of_gradients_are_refused() -> None:
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    outputs = winograd.convolve(torch.randn(2, 4, 6, 6), weight, None, 1)
    with pytest.raises(NotImplementedError, match="use train.convolutions=direct"):
        torch.autograd.grad(outputs.sum(), weight, create_graph=True)


def test_looking_for_gains_changes_no_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128), nn.Conv2d(128, 128, 3)).train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert gains(model, (3, 12, 12), "winograd")
    assert [part.training for part in model] == [True, False, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model[2]._forward_pre_hooks


WIDE = {"name": "article_cnn", "dropout": 0.0}


def test_auto_is_chosen_by_the_first_start(shards: Path, tmp_path: Path) -> None:
    train = {"precision": "auto", "memory_format": "auto", "duration": "2 steps"}
    recipe = write_recipe(tmp_path, shards, model=WIDE, train=train)
    train_ranks(1, recipe)
    settled = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["train"]["convolutions"]
    assert settled in ("direct", "winograd")
    other = {"direct": "winograd", "winograd": "direct"}[settled]
    code, _, told = failure_of(str(recipe), f"train.convolutions={other}")
    assert code == 2
    assert "train.convolutions" in told


def test_a_precision_that_changes_takes_the_method_with_it(shards: Path, tmp_path: Path) -> None:
    # one step of one image in fp16: on a CPU torch takes seconds for the gradients of each
    train = {"precision": "fp32", "memory_format": "channels_last", "duration": "1 steps", "global_batch_size": 1}
    recipe = write_recipe(tmp_path, shards, model=WIDE, train=train)
    train_ranks(1, recipe, "train.convolutions=winograd")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    other = ["train.precision=fp16", "train.duration=2 steps"]
    allowed = "run.allow_changes=[train.precision,train.convolutions,train.duration]"
    train_ranks(1, recipe, f"run.dir={tmp_path / 'copy'}", *other, allowed)
    code, _, told = failure_of(str(recipe), *other)
    assert code == 2
    assert "train.precision: fp32 -> fp16\n  - train.convolutions: winograd -> direct\n" in told


def _train_without_compiler(rank: int, recipe: str, *overrides: str) -> str:
    """Runs in a rank: train, on one rank without a compiler; return the command's output."""
    if os.environ["RANK"] == str(rank):
        os.environ["CC"] = "no-such-compiler"
    code, _, told = failure_of(recipe, *overrides)
    assert code == 0, told
    return told


def test_a_run_resumes_without_a_compiler_and_warns(shards: Path, tmp_path: Path) -> None:
    train = {"precision": "fp32", "memory_format": "channels_last", "duration": "2 steps"}
    recipe = write_recipe(tmp_path, shards, model=WIDE, train=train)
    train_ranks(1, recipe, "train.convolutions=winograd")
    more = ["train.convolutions=auto", "train.duration=4 steps", "run.allow_changes=[train.duration]"]
    (told,) = run_ranks(1, _train_without_compiler, 0, str(recipe), *more)
    assert "warning: train.convolutions=winograd needs a C compiler (there is no no-such-compiler)" in told
    assert "falling back to torch's convolutions" in told
    assert len(train_lines(tmp_path / "run")) == 4


def test_a_rank_without_a_compiler_says_so_and_computes_as_torch_does(shards: Path, tmp_path: Path) -> None:
    train = {"precision": "fp32", "memory_format": "channels_last", "duration": "2 steps", "convolutions": "winograd"}
    recipe = write_recipe(tmp_path, shards, model=WIDE, train=train)
    told = run_ranks(2, _train_without_compiler, 1, str(recipe))
    assert "needs a C compiler" not in told[0]
    assert "warning: rank 1: train.convolutions=winograd needs a C compiler" in told[1]


def test_a_run_of_an_earlier_version_resumes(shards: Path, tmp_path: Path) -> None:
    """Its recipe has the key by its old name."""
    train = {"precision": "fp32", "memory_format": "channels_last", "duration": "2 steps", "convolutions": "winograd"}
    recipe = write_recipe(tmp_path, shards, model=WIDE, train=train)
    recipe.write_text(recipe.read_text().replace("convolutions", "conv_gradients"))
    train_ranks(1, recipe)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["train"]["convolutions"] == "winograd"
