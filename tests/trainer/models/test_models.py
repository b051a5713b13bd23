import pytest
import torch

from shardstep.configs.components import options_of, resolve_options
from shardstep.configs.errors import InputError
from shardstep.trainer.models import COMMON_OPTIONS, MODELS, build_model, models_for
from shardstep.trainer.optim.losses import Objective, check_outputs, cross_entropy, l1, mse, nll, perceptron

CLASSIFIERS = [name for name in MODELS if name != "autoencoder"]
NO_LABELS = torch.zeros(0, dtype=torch.long)


def build(
    name: str, image_shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10, **options: object
) -> torch.nn.Module:
    torch.manual_seed(0)
    section, problems = resolve_options("model", {"name": name, **options}, models_for(name), COMMON_OPTIONS)
    assert not problems
    return build_model(section, image_shape, num_classes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("image_shape", [(3, 32, 32), (1, 28, 28), (3, 40, 48)])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_shapes(name: str, image_shape: tuple[int, int, int], batch: int) -> None:
    model = build(name, image_shape, num_classes=7).eval()
    expected = image_shape if name == "autoencoder" else (7,)
    assert model(torch.zeros(batch, *image_shape)).shape == (batch, *expected)


# The largest two take 20 s each.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.drill] * (name in ("article_cnn", "whitening_cnn")))
        for name in CLASSIFIERS
    ],
)
def test_overfits_a_tiny_set(name: str) -> None:
    images = torch.randn(16, 3, 17, 17, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(16) % 4
    without_dropout = {key: 0.0 for key in ("dropout", "feature_dropout") if key in options_of(MODELS[name])}
    model = build(name, (3, 17, 17), 4, **without_dropout)
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
    images = torch.zeros(0, 3, 32, 32)
    loss = mse(model(images), images) if name == "autoencoder" else cross_entropy(model(images), NO_LABELS)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_parameter_counts_by_hand() -> None:
    # mlp: 3072*128 + 128, 128*64 + 64, 64*10 + 10
    assert sum(p.numel() for p in build("mlp").parameters()) == 393_344 + 8_256 + 650
    # article_cnn: 3*64*9 + 64, 64*128*9 + 128, 128*128*9 + 128, 128*64*9 + 64, 64*32 + 32, 32*10 + 10
    expected = 1_792 + 73_856 + 147_584 + 73_792 + 2_080 + 330
    assert sum(p.numel() for p in build("article_cnn").parameters()) == expected


def test_too_small_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"images of 8x8 pixels are too small, it needs 9x9: give data.resize=9"):
        build("article_cnn", (1, 8, 8))


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(InputError, match="negative_slope belongs to activation=leaky_relu"):
        build("mlp", negative_slope=0.2)
    with pytest.raises(InputError, match="sync_batch_norm=true has no effect: mlp has no batch norm"):
        build("mlp", sync_batch_norm=True)


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


def test_a_shortcut_leads_around_all_but_the_first_convolution_of_a_deep_group() -> None:
    model = build("whitening_cnn", (3, 17, 17), widths=[4, 6], depths=[2, 4]).eval()
    assert [sum(isinstance(layer, torch.nn.Conv2d) for layer in group.modules()) for group in model.groups] == [2, 4]
    images, conv = torch.randn(2, 4, 8, 8), model.groups[1][0]
    first = torch.nn.functional.gelu(torch.nn.functional.max_pool2d(conv(images), 2) / (1 + 1e-5) ** 0.5)
    for norm in (layer for layer in model.groups[1][4] if isinstance(layer, torch.nn.BatchNorm2d)):
        torch.nn.init.zeros_(norm.weight)  # nothing comes through the layers
    assert torch.allclose(model.groups[1](images), torch.nn.functional.gelu(first), atol=1e-6)


@pytest.mark.parametrize("depths", [[2], [2, 1], [2, 2, 2]])
def test_depths_that_do_not_fit_are_refused(depths: list[int]) -> None:
    with pytest.raises(InputError, match="depths must be 2 numbers of 2 or more, one for each of widths"):
        build("whitening_cnn", (3, 17, 17), widths=[4, 6], depths=depths)


def test_one_of_equally_high_places_gets_the_gradient() -> None:
    model = build("whitening_cnn", (3, 17, 17), widths=[4])
    model.whitening = model.activation = model.groups = torch.nn.Identity()
    features = torch.zeros(2, 4, 3, 3, requires_grad=True)
    assert torch.equal(model(features + 2), model.head(torch.full((2, 4), 2.0)) * 0.125)
    model(features).sum().backward()
    assert features.grad is not None
    assert features.grad.count_nonzero() == 2 * 4


def test_nll_of_log_softmax_is_cross_entropy() -> None:
    logits, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 4
    assert torch.allclose(nll(logits.log_softmax(1), labels), cross_entropy(logits, labels))


def test_label_smoothing_by_hand() -> None:
    # two classes, logits 0: every target distribution costs log 2
    assert cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, 0]), label_smoothing=0.2).tolist() == pytest.approx(
        [0.693147] * 3
    )
    # s = 0.5 over 2 classes: 0.75 on the label, 0.25 on the other; logits (log 3, 0) -> probabilities 3/4 and 1/4
    expected = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    found = cross_entropy(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]), label_smoothing=0.5)
    assert found.item() == pytest.approx(expected.item())


def test_outputs_that_a_loss_does_not_take() -> None:
    images, logits = torch.randn(3, 1, 4, 4), torch.randn(3, 4)
    check_outputs({"name": "nll"}, logits.log_softmax(1), images)
    check_outputs({"name": "cross_entropy"}, logits, images)
    check_outputs({"name": "mse"}, torch.zeros_like(images), images)
    with pytest.raises(InputError, match="takes log-probabilities"):
        check_outputs({"name": "nll"}, logits, images)
    with pytest.raises(InputError, match="compares images with images, but the model's outputs have shape"):
        check_outputs({"name": "l1"}, logits, images)
    with pytest.raises(InputError, match="needs one number per class"):
        check_outputs({"name": "cross_entropy"}, images, images)


def test_perceptron_loss_is_the_documents_for_two_classes() -> None:
    # f = outputs[1] - outputs[0]: 2, -3, -1, 0.5; labels 1, 1, 0, 0 are y = 1, 1, -1, -1
    outputs = torch.tensor([[0.0, 2.0], [3.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    # max(0, -y f): 0, 3, 0, 0.5
    assert perceptron(outputs, torch.tensor([1, 1, 0, 0])).tolist() == [0, 3, 0, 0.5]


def test_perceptron_loss_corrects_the_best_wrong_class_and_ties() -> None:
    outputs = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 1.0], [0.0, 0.0, -1.0]], requires_grad=True)
    loss = perceptron(outputs, torch.tensor([0, 0, 1]))
    loss.sum().backward()
    assert loss.tolist() == [2, 0, 0]  # 3 - 1, right, a tie
    assert outputs.grad is not None
    assert outputs.grad.tolist() == [[-1, 1, 0], [0, 0, 0], [1, -1, 0]]


def test_perceptron_loss_does_not_hide_a_nan() -> None:
    assert perceptron(torch.full((2, 3), torch.nan), torch.tensor([0, 1])).isnan().all()


def test_reconstruction_losses_by_hand() -> None:
    images = torch.zeros(2, 1, 1, 2)
    outputs = torch.tensor([[[[1.0, 3.0]]], [[[0.0, -2.0]]]])
    assert mse(outputs, images).tolist() == [(1 + 9) / 2, (0 + 4) / 2]
    assert l1(outputs, images).tolist() == [(1 + 3) / 2, (0 + 2) / 2]


def test_auxiliary_heads_are_weighted_into_the_loss() -> None:
    objective = Objective(cross_entropy, cross_entropy, reconstructs=False, auxiliary_weight=0.25)
    main, head, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
    expected = cross_entropy(main, labels) + 0.25 * cross_entropy(head, labels)
    assert objective.loss((main, head), torch.zeros(3, 1, 2, 2), labels).item() == pytest.approx(expected.sum().item())
    assert objective.correct((main, head), labels) == (main.argmax(1) == labels).sum()


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_recurrent_reads_rows_in_turn(cell: str) -> None:
    model = build("recurrent", (2, 5, 3), cell=cell).eval()
    image = torch.randn(1, 2, 5, 3)
    rows = torch.stack([image[0, :, row, :].T.flatten() for row in range(5)])  # (H, W C), channels last
    state = model.cell(rows.unsqueeze(0))[0][0, -1]
    assert torch.allclose(model(image)[0], model.head(state), atol=1e-6)


def test_convnet_is_the_documents() -> None:
    # 1*16*9 + 16, 16*32*9 + 32, 8x8 -> 6 -> 4 -> pooled 2: 32*2*2*64 + 64, 64*10 + 10
    assert sum(p.numel() for p in build("convnet", (1, 8, 8)).parameters()) == 160 + 4_640 + 8_256 + 650
    layers = [type(layer).__name__ for layer in build("convnet", (1, 8, 8))]
    assert layers == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Pool", "Dropout2d", "Flatten", "Linear", "ReLU", "Dropout",
                      "Linear", "LogSoftmax"]  # fmt: skip


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "leaky_relu"])
@pytest.mark.parametrize("name", ["article_cnn", "autoencoder", "convnet", "mlp", "recurrent"])
def test_activation_is_an_option_of_the_documents_models(name: str, activation: str) -> None:
    kind = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "ReLU", "leaky_relu": "LeakyReLU"}[activation]
    found = {type(layer).__name__ for layer in build(name, activation=activation).modules()}
    assert found & {"Sigmoid", "Tanh", "ReLU", "LeakyReLU"} == {kind}


@pytest.mark.parametrize("pooling", ["max", "min", "avg"])
@pytest.mark.parametrize("name", ["article_cnn", "convnet"])
def test_pooling_is_an_option(name: str, pooling: str) -> None:
    assert any(layer.extra_repr() == pooling for layer in build(name, pooling=pooling).modules())
