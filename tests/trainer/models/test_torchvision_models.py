"""Every torchvision classifier by name; one of each family on real, short and empty batches."""

import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

from shardstep.configs.errors import InputError
from shardstep.trainer.models import models_for
from shardstep.trainer.models.pretrained import fit_weights, read_weights_file
from shardstep.trainer.models.torchvision_models import downloaded_weights, torchvision_models, with_new_names
from shardstep.trainer.optim.losses import Objective, cross_entropy
from tests.trainer.models.test_models import build

# the smallest of each family, and a size that it takes
FAMILIES = {
    "googlenet": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
}
LARGE_FAMILIES = {
    "alexnet": 32,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "swin_t": 32,
    "vgg11_bn": 32,
    "vit_b_32": 32,
}
STEMS = [
    "resnet18",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "googlenet",
]


def test_every_classifier_of_torchvision_is_there() -> None:
    names = set(torchvision.models.list_models(module=torchvision.models))
    assert set(torchvision_models()) == {f"torchvision/{name}" for name in names}
    assert {name.split("_")[0].rstrip("0123456789") for name in names} == {
        name.split("_")[0].rstrip("0123456789")
        for name in [*FAMILIES, *LARGE_FAMILIES, "resnext50_32x4d", "wide_resnet50_2"]
    }  # no family is without a test


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.drill) for name in LARGE_FAMILIES)])
def test_short_batches(name: str) -> None:
    """A rank's share may be one image, or none."""
    side = (FAMILIES | LARGE_FAMILIES)[name]
    model = build(f"torchvision/{name}", (3, side, side), 7).train()
    objective = Objective(cross_entropy, cross_entropy, reconstructs=False, auxiliary_weight=0.3)
    for batch in (2, 1, 0):
        model.zero_grad()
        labels = torch.zeros(batch, dtype=torch.long)
        images = torch.randn(batch, 3, side, side)
        objective.loss(model(images), images, labels).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients if gradient is not None) == (batch > 0)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert model.eval()(torch.randn(1, 3, side, side)).shape == (1, 7)


@pytest.mark.drill
@pytest.mark.parametrize("name", sorted(torchvision_models()))
def test_every_classifier_fits_images_of_its_size(name: str) -> None:
    side = 299 if name.endswith("inception_v3") else 224
    build(name, (3, side, side), 7)  # computes the shapes of a training pass


@pytest.mark.parametrize("name", STEMS)
def test_small_images_keep_their_resolution(name: str) -> None:
    small, large = (build(f"torchvision/{name}", (3, 32, 32), stem=stem) for stem in ("auto", "imagenet"))
    first = next(layer for layer in small.modules() if isinstance(layer, torch.nn.Conv2d))
    assert (first.kernel_size, first.stride) == ((3, 3), (1, 1))
    assert any(max(layer.stride) > 1 for layer in list(large.modules())[:8] if isinstance(layer, torch.nn.Conv2d))
    assert small(torch.randn(2, 3, 32, 32)) is not None


def test_one_channel() -> None:
    assert build("torchvision/resnet18", (1, 28, 28), 5).eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "side", "cure"),
    [("inception_v3", 96, 299), ("vit_b_16", 40, 16), ("maxvit_t", 96, 224)],
)
def test_images_that_do_not_fit_say_which_size_does(name: str, side: int, cure: int) -> None:
    with pytest.raises(InputError, match=rf"images of {side}x{side} pixels do not fit .*give data.resize={cure}$"):
        build(f"torchvision/{name}", (3, side, side))
    build(f"torchvision/{name}", (3, cure, cure))


def test_without_auxiliary_heads_smaller_images_fit() -> None:
    model = build("torchvision/inception_v3", (3, 75, 75), auxiliary_weight=0.0)
    assert isinstance(model.train()(torch.zeros(2, 3, 75, 75)), torch.Tensor)


def test_options() -> None:
    model = build("torchvision/resnet18", activation="leaky_relu", negative_slope=0.1, pooling="min", stem="imagenet")
    kinds = [type(layer).__name__ for layer in model.modules()]
    assert "ReLU" not in kinds
    assert "MaxPool2d" not in [type(layer).__name__ for layer in model.children()]
    assert kinds.count("LeakyReLU") == 9
    dropped = build("torchvision/efficientnet_b0", dropout=0.7)
    assert {layer.p for layer in dropped.modules() if isinstance(layer, torch.nn.Dropout)} == {0.7}


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "silu"])
def test_replaced_activations_can_be_learnt_through(activation: str) -> None:
    model = build("torchvision/mobilenet_v3_small", (3, 32, 32), 3, activation=activation).train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("efficientnet_v2_s", {"activation": "tanh"}, "activation=tanh cannot be used: efficientnet_v2_s changes"),
        ("resnet18", {"dropout": 0.5}, "dropout=0.5 has no effect: resnet18 has no such layer"),
        ("vit_b_32", {"pooling": "avg"}, "pooling=avg has no effect"),
        ("vgg11", {"stem": "cifar"}, "stem=cifar has no effect"),
        ("resnet18", {"negative_slope": 0.1}, "negative_slope belongs to activation=leaky_relu"),
    ],
)
def test_options_without_effect(name: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(f"torchvision/{name}", **options)


def test_unknown_names_list_the_neighbours() -> None:
    from shardstep.configs.components import resolve_options

    for name, hint in (("resnet18", "torchvision/resnet18"), ("torchvision/resnet19", "torchvision/resnet1")):
        _, problems = resolve_options("model", {"name": name}, models_for(name))
        assert hint in problems[0]


# --- pretrained weights ----------------------------------------------------------------------------------------------


NAME = "torchvision/shufflenet_v2_x0_5"


def load_pretrained(model: torch.nn.Module, pretrained: str | bool, num_classes: int = 7) -> list[str]:
    """As a run does; returns what is new in the head."""
    found = downloaded_weights(NAME) if pretrained is True else with_new_names(read_weights_file(Path(str(pretrained))))
    fit = fit_weights(model, found, num_classes, "model.pretrained")
    assert fit.misfits is None
    return fit.head


@pytest.fixture(scope="module")
def donor() -> torch.nn.Module:
    torch.manual_seed(1)
    return torchvision.models.shufflenet_v2_x0_5(num_classes=1000)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_from_a_file(donor: torch.nn.Module, tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"weights.{suffix}"
    save_file(donor.state_dict(), path) if suffix == "safetensors" else torch.save(donor.state_dict(), path)
    model = build(NAME, (3, 64, 64), 7, pretrained=str(path))
    before = model.fc.weight.clone()
    assert load_pretrained(model, str(path)) == ["fc.weight", "fc.bias"]
    assert torch.equal(model.conv1[0].weight, donor.conv1[0].weight)
    assert torch.equal(model.fc.weight, before)


def test_weights_with_the_same_classes_include_the_head(donor: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    model = build(NAME, (3, 64, 64), 1000, pretrained=True)
    assert load_pretrained(model, str(tmp_path / "weights.pth")) == []
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), donor.eval()(images))


def test_grey_images_see_what_three_equal_channels_would(donor: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    model = build(NAME, (1, 64, 64), 1000, pretrained=True)
    load_pretrained(model, str(tmp_path / "weights.pth"))
    grey = torch.randn(2, 1, 64, 64)
    assert torch.allclose(model.eval()(grey), donor.eval()(grey.expand(-1, 3, -1, -1)), atol=1e-4)


@pytest.fixture
def weights_server(
    donor: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, type]]:
    """torchvision's address of the weights points to a local server; torch keeps downloads in a folder of the test."""
    import hashlib

    torch.save(donor.state_dict(), tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    file = tmp_path / f"shuffle-{digest}.pth"
    shutil.move(tmp_path / "weights.pth", file)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object, **options: object):
            super().__init__(*arguments, directory=str(tmp_path), **options)  # type: ignore[arg-type]

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    monkeypatch.setattr(weights.value, "url", f"http://127.0.0.1:{server.server_port}/{file.name}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    yield file, type(weights)
    server.shutdown()
    server.server_close()


def test_weights_are_downloaded(weights_server: tuple[Path, type], donor: torch.nn.Module) -> None:
    model = build(NAME, (3, 64, 64), 7, pretrained=True)
    assert load_pretrained(model, True) == ["fc.weight", "fc.bias"]
    assert torch.equal(model.conv1[0].weight, donor.conv1[0].weight)


def test_weights_damaged_in_the_cache_are_downloaded_again(
    weights_server: tuple[Path, type], donor: torch.nn.Module, tmp_path: Path
) -> None:
    kept = tmp_path / "torch" / "hub" / "checkpoints" / weights_server[0].name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(weights_server[0].read_bytes()[:1000])
    model = build(NAME, (3, 64, 64), 7, pretrained=True)
    load_pretrained(model, True)
    assert torch.equal(model.conv1[0].weight, donor.conv1[0].weight)


@pytest.mark.parametrize("name", ["googlenet", "densenet121"])
def test_weights_with_heads_and_with_old_names(name: str, tmp_path: Path) -> None:
    """As torchvision publishes them: googlenet's with auxiliary heads, densenet's with the names of its first version."""
    import re

    donor = build(f"torchvision/{name}", (3, 64, 64), 1000, stem="imagenet")
    layer = re.compile(r"(denselayer\d+\.(?:norm|conv))([12]\.)")
    state = {layer.sub(r"\1.\2", key): value for key, value in donor.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    model = build(f"torchvision/{name}", (3, 64, 64), 1000, pretrained=str(tmp_path / "weights.pth"))
    assert load_pretrained(model, str(tmp_path / "weights.pth")) == []
    assert all(torch.equal(value, donor.state_dict()[key]) for key, value in model.state_dict().items())


def test_weights_damaged_on_the_way_are_refused(weights_server: tuple[Path, type]) -> None:
    file, _ = weights_server
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="invalid hash value"):
        load_pretrained(build(NAME, (3, 64, 64), 7), True)


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    monkeypatch.setattr(weights.value, "url", "http://127.0.0.1:9/shuffle-00000000.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot be downloaded from http.*give model.pretrained=PATH, or train from"):
        load_pretrained(build(NAME, (3, 64, 64), 7), True)
