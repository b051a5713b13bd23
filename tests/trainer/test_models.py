import pytest
import torch

from shardstep.configs.components import resolve
from shardstep.configs.errors import InputError
from shardstep.trainer.losses import check_outputs, cross_entropy, nll
from shardstep.trainer.models import COMMON_OPTIONS, MODELS, build_model
from shardstep.trainer.models.layers import GlobalPool, activation_layer


def build(
    name: str, image_shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10, **options: object
) -> torch.nn.Module:
    torch.manual_seed(0)
    section, problems = resolve("model", {"name": name, **options}, MODELS, COMMON_OPTIONS)
    assert not problems
    return build_model(section, image_shape, num_classes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("image_shape", [(3, 32, 32), (1, 28, 28), (3, 40, 48)])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_shapes(name: str, image_shape: tuple[int, int, int], batch: int) -> None:
    model = build(name, image_shape, num_classes=7).eval()
    assert model(torch.zeros(batch, *image_shape)).shape == (batch, 7)


@pytest.mark.parametrize("name", MODELS)
def test_overfits_a_tiny_set(name: str) -> None:
    images = torch.randn(16, 3, 17, 17, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 4
    model = build(name, (3, 17, 17), 4, **({"dropout": 0.0} if name != "whitening_cnn" else {}))
    if hasattr(model, "initialize"):
        model.initialize(images)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.003)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).all()
    assert loss < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_batch_passes_forward_and_backward(name: str) -> None:
    model = build(name)
    outputs = model(torch.zeros(0, 3, 32, 32))
    cross_entropy(outputs, torch.zeros(0, dtype=torch.long)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_parameter_counts_by_hand() -> None:
    # mlp: 3072*128 + 128, 128*64 + 64, 64*10 + 10
    assert sum(p.numel() for p in build("mlp").parameters()) == 393_344 + 8_256 + 650
    # article_cnn: 3*64*9 + 64, 64*128*9 + 128, 128*128*9 + 128, 128*64*9 + 64, 64*32 + 32, 32*10 + 10
    expected = 1_792 + 73_856 + 147_584 + 73_792 + 2_080 + 330
    assert sum(p.numel() for p in build("article_cnn").parameters()) == expected


def test_too_small_images_are_named() -> None:
    with pytest.raises(InputError, match=r"images of 8x8 pixels are too small, it needs 9x9: give data.resize=9"):
        build("article_cnn", (1, 8, 8))


def test_options_without_effect_are_named() -> None:
    with pytest.raises(InputError, match="negative_slope belongs to activation=leaky_relu"):
        build("mlp", negative_slope=0.2)
    with pytest.raises(InputError, match="sync_batch_norm=true has no effect: mlp has no batch norm"):
        build("mlp", sync_batch_norm=True)


def test_pooling_by_hand() -> None:
    features = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    assert [GlobalPool(kind)(features).item() for kind in ("avg", "max", "min")] == [3.0, 6.0, 1.0]  # type: ignore[arg-type]


def test_leaky_relu_slope() -> None:
    assert activation_layer("leaky_relu", 0.2)(torch.tensor([-1.0])).item() == pytest.approx(-0.2)
    assert activation_layer("leaky_relu")(torch.tensor([-1.0])).item() == pytest.approx(-0.01)


def test_whitening_decorrelates() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(200, 3, 12, 12, generator=generator).cumsum(3)  # strongly correlated neighbours
    model = build("whitening_cnn", (3, 17, 17))
    model.initialize(images)
    layer = model.whitening
    outputs = (
        torch.nn.functional.conv2d(images, layer.weight)[:, :12].transpose(0, 1).flatten(1)
    )  # without the negatives
    covariance = torch.cov(outputs.double())
    # the covariance of whitened patches is the identity, up to epsilon in small directions
    assert (covariance - torch.eye(12)).abs().max() < 0.05
    assert torch.equal(layer.weight[:12], -layer.weight[12:])
    assert not layer.weight.requires_grad


def test_nll_of_log_softmax_is_cross_entropy() -> None:
    logits, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 4
    assert torch.allclose(nll(logits.log_softmax(1), labels), cross_entropy(logits, labels))


def test_label_smoothing_by_hand() -> None:
    # two classes, logits 0: every target distribution costs log 2
    assert cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, 0]), label_smoothing=0.2).item() == pytest.approx(
        3 * 0.693147
    )
    # s = 0.5 over 2 classes: 0.75 on the label, 0.25 on the other; logits (log 3, 0) -> probabilities 3/4 and 1/4
    expected = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    found = cross_entropy(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]), label_smoothing=0.5)
    assert found.item() == pytest.approx(expected.item())


def test_nll_refuses_logits() -> None:
    check_outputs({"name": "nll"}, torch.randn(3, 4).log_softmax(1))
    check_outputs({"name": "cross_entropy"}, torch.randn(3, 4))
    with pytest.raises(InputError, match="takes log-probabilities"):
        check_outputs({"name": "nll"}, torch.randn(3, 4))
