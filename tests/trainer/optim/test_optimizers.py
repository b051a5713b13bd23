"""Each optimizer of the documents against its equation, in float64, over several steps."""

import io
import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch

from shardstep.configs.components import resolve_options
from shardstep.configs.errors import InputError
from shardstep.configs.schema import Precision
from shardstep.trainer.optim.muon import FilterMuon, orthogonalize
from shardstep.trainer.optim.optimizers import (
    CANNOT_WORK,
    COMMON_OPTIONS,
    OPTIMIZERS,
    build_optimizer,
    check_optimizer,
    check_schedule_has_effect,
)

DEFAULTS = {key: default for key, (_, default) in COMMON_OPTIONS.items()}
START = [1.0, -2.0, 0.5]


def gradient(w: list[float]) -> list[float]:
    """Of the loss sum(w^4 / 4 + i w): steep enough that every term of an update matters."""
    return [value**3 + place for place, value in enumerate(w)]


def sgd(eta: float, mu: float = 0.0, nesterov: bool = False) -> Iterator[list[float]]:
    w, v = list(START), [0.0] * 3
    while True:
        g = gradient(w)
        v = [mu * a + b for a, b in zip(v, g, strict=True)]
        step = [b + mu * a for a, b in zip(v, g, strict=True)] if nesterov else v
        w = [a - eta * b for a, b in zip(w, step, strict=True)]
        yield w


def document_momentum(eta: float, mu: float) -> Iterator[list[float]]:
    """The documents' form: the learning rate inside the velocity, which is added to the weights."""
    w, v = list(START), [0.0] * 3
    while True:
        v = [mu * a - eta * b for a, b in zip(v, gradient(w), strict=True)]
        w = [a + b for a, b in zip(w, v, strict=True)]
        yield w


def adagrad(eta: float, eps: float) -> Iterator[list[float]]:
    w, s = list(START), [0.0] * 3
    while True:
        g = gradient(w)
        s = [a + b * b for a, b in zip(s, g, strict=True)]
        w = [a - eta * b / (math.sqrt(c) + eps) for a, b, c in zip(w, g, s, strict=True)]
        yield w


def adadelta(eta: float, rho: float, eps: float) -> Iterator[list[float]]:
    w, s, u = list(START), [0.0] * 3, [0.0] * 3
    while True:
        g = gradient(w)
        s = [rho * a + (1 - rho) * b * b for a, b in zip(s, g, strict=True)]
        d = [math.sqrt(b + eps) / math.sqrt(a + eps) * c for a, b, c in zip(s, u, g, strict=True)]
        u = [rho * a + (1 - rho) * b * b for a, b in zip(u, d, strict=True)]
        w = [a - eta * b for a, b in zip(w, d, strict=True)]
        yield w


def rmsprop(eta: float, alpha: float, eps: float) -> Iterator[list[float]]:
    w, s = list(START), [0.0] * 3
    while True:
        g = gradient(w)
        s = [alpha * a + (1 - alpha) * b * b for a, b in zip(s, g, strict=True)]
        w = [a - eta * b / (math.sqrt(c) + eps) for a, b, c in zip(w, g, s, strict=True)]
        yield w


def adam(eta: float, b1: float, b2: float, eps: float, decay: float = 0.0) -> Iterator[list[float]]:
    w, m, s, t = list(START), [0.0] * 3, [0.0] * 3, 0
    while True:
        t, g = t + 1, gradient(w)
        w = [a - eta * decay * a for a in w]
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        s = [b2 * a + (1 - b2) * b * b for a, b in zip(s, g, strict=True)]
        w = [a - eta * (b / (1 - b1**t)) / (math.sqrt(c / (1 - b2**t)) + eps) for a, b, c in zip(w, m, s, strict=True)]
        yield w


class Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))


@pytest.mark.parametrize(
    ("section", "equation"),
    [
        ({"name": "sgd", "lr": 0.01}, lambda: sgd(0.01)),
        ({"name": "sgd", "lr": 0.01, "momentum": 0.9}, lambda: sgd(0.01, 0.9)),
        ({"name": "sgd", "lr": 0.01, "momentum": 0.9}, lambda: document_momentum(0.01, 0.9)),
        ({"name": "sgd", "lr": 0.01, "momentum": 0.9, "nesterov": True}, lambda: sgd(0.01, 0.9, nesterov=True)),
        ({"name": "adagrad", "lr": 0.1}, lambda: adagrad(0.1, 1e-10)),
        ({"name": "adadelta"}, lambda: adadelta(1.0, 0.9, 1e-6)),
        ({"name": "adadelta", "lr": 0.5, "rho": 0.8}, lambda: adadelta(0.5, 0.8, 1e-6)),
        ({"name": "rmsprop", "lr": 0.01, "alpha": 0.9}, lambda: rmsprop(0.01, 0.9, 1e-8)),
        ({"name": "adam", "lr": 0.05}, lambda: adam(0.05, 0.9, 0.999, 1e-8)),
        ({"name": "adam", "lr": 0.05, "betas": [0.8, 0.9], "eps": 0.1}, lambda: adam(0.05, 0.8, 0.9, 0.1)),
        (
            {"name": "adamw", "lr": 0.05, "weight_decay": 0.2, "decay_biases_and_norms": True},
            lambda: adam(0.05, 0.9, 0.999, 1e-8, decay=0.2),
        ),
    ],
)
def test_equation(section: dict, equation: Callable[[], Iterator[list[float]]]) -> None:
    model = Weights()
    optimizer = build_optimizer(DEFAULTS | section, model)
    for _, expected in zip(range(12), equation(), strict=False):
        optimizer.zero_grad()
        (model.w**4 / 4 + model.w * torch.arange(3)).sum().backward()
        optimizer.step()
        assert model.w.tolist() == pytest.approx(expected, rel=1e-12)


def test_every_optimizer_of_torch_is_known_or_refused() -> None:
    names = {
        name.lower()
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    } - {"optimizer"}
    assert names | {"filter_muon"} == set(OPTIMIZERS) | set(CANNOT_WORK)


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))


def test_weight_decay_spares_biases_and_norms() -> None:
    section = DEFAULTS | {"name": "sgd", "lr": 0.1, "weight_decay": 0.5}
    groups = build_optimizer(section, model()).param_groups
    assert [(group["weight_decay"], sorted(p.ndim for p in group["params"])) for group in groups] == [
        (0.5, [2, 2]),
        (0.0, [1, 1, 1, 1]),
    ]
    everything = build_optimizer(section | {"decay_biases_and_norms": True}, model()).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in everything] == [(0.5, 6)]


def test_groups_by_name_and_dimension() -> None:
    section = DEFAULTS | {
        "name": "sgd",
        "lr": 0.1,
        "groups": [{"match": "2.*", "lr": 0.01, "momentum": 0.9}, {"ndim": 1, "lr": 0.2}],
    }
    groups = build_optimizer(section, model()).param_groups
    found = [(group["lr"], group["initial_lr"], group["momentum"], len(group["params"])) for group in groups]
    # the head's weight and bias; the other biases and the norm; the first weight
    assert found == [(0.01, 0.01, 0.9, 2), (0.2, 0.2, 0, 3), (0.1, 0.1, 0, 1)]


def test_a_group_without_parameters_is_an_error() -> None:
    section = DEFAULTS | {"name": "sgd", "lr": 0.1, "groups": [{"match": "conv*", "lr": 0.01}]}
    with pytest.raises(InputError, match=r"groups\[0\].*matches no parameter"):
        build_optimizer(section, model())


def test_contradicting_options_are_an_error() -> None:
    with pytest.raises(InputError, match="Nesterov momentum requires"):
        build_optimizer(DEFAULTS | {"name": "sgd", "lr": 0.1, "nesterov": True}, model())


def test_frozen_parameters_are_left_out() -> None:
    frozen = model()
    frozen[0].weight.requires_grad_(False)
    optimizer = build_optimizer(DEFAULTS | {"name": "sgd", "lr": 0.1}, frozen)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5


# --- every optimizer of torch.optim ----------------------------------------------------------------------------------


def matrices() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.Tanh(), torch.nn.Linear(6, 2, bias=False))


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> list[float]:
    losses = []
    for number in range(first, first + count):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        loss = (net(inputs) - inputs[:, :2].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


BESIDE_MUON = {"name": "adamw", "lr": 0.01, "groups": [{"match": "0.*", "name": "muon", "lr": 0.02}]}


@pytest.mark.parametrize("given", [*({"name": name} for name in OPTIMIZERS), BESIDE_MUON], ids=lambda g: str(g["name"]))
def test_runs_and_resumes_through_its_state(given: dict) -> None:
    """Weights and state, through what a checkpoint stores, lead to the same losses as continuing."""
    section, problems = resolve_options("optimizer", given, OPTIMIZERS, COMMON_OPTIONS)
    assert not problems + check_optimizer(section)
    net = matrices()
    optimizer = build_optimizer(section, net)
    before = {name: value.clone() for name, value in net.named_parameters()}
    steps(net, optimizer, 3)
    assert all(not torch.equal(value, before[name]) for name, value in net.named_parameters())

    buffer = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    again = matrices()
    again.load_state_dict(weights)
    resumed = build_optimizer(section, again)
    resumed.load_state_dict(state)
    assert [group["initial_lr"] for group in resumed.param_groups] == [g["initial_lr"] for g in optimizer.param_groups]
    assert steps(again, resumed, 4, first=3) == steps(net, optimizer, 4, first=3)


def test_several_optimizers_do_what_each_does_alone() -> None:
    section, _ = resolve_options("optimizer", BESIDE_MUON, OPTIMIZERS, COMMON_OPTIONS)
    assert not check_optimizer(section)
    net, twin = matrices(), matrices()
    together = build_optimizer(section, net)
    muon = torch.optim.Muon([twin[0].weight], lr=0.02)
    adamw = torch.optim.AdamW([twin[2].weight], lr=0.01)
    for number in range(4):
        for group in together.param_groups:
            group["lr"] = group["initial_lr"] / (number + 1)  # as the loop sets the rate
        for group, rate in ((muon.param_groups[0], 0.02), (adamw.param_groups[0], 0.01)):
            group["lr"] = rate / (number + 1)
        steps(net, together, 1, first=number)
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        twin.zero_grad()
        (twin(inputs) - inputs[:, :2].sin()).square().mean().backward()
        muon.step()
        adamw.step()
    assert torch.equal(net[0].weight, twin[0].weight)
    assert torch.allclose(net[2].weight, twin[2].weight, atol=1e-7)  # ours is fused


def test_a_group_with_a_name_has_its_own_defaults_and_decay() -> None:
    given = {"name": "sgd", "lr": 0.1, "weight_decay": 0.5, "groups": [{"match": "2.*", "name": "adam"}]}
    section, _ = resolve_options("optimizer", given, OPTIMIZERS, COMMON_OPTIONS)
    assert not check_optimizer(section)
    found = [(g["lr"], g["weight_decay"], len(g["params"])) for g in build_optimizer(section, model()).param_groups]
    assert found == [(1e-3, 0, 2), (0.1, 0.5, 1), (0.1, 0.0, 3)]


def test_muon_alone_says_how_it_can_be_used() -> None:
    section, _ = resolve_options("optimizer", {"name": "muon"}, OPTIMIZERS, COMMON_OPTIONS)
    with pytest.raises(InputError, match=r"only supports 2D parameters.*optimizer.groups='\[{ndim: 2, name: muon"):
        build_optimizer(section, model())


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"ndim": 2, "name": "muno"}, r"groups\[0\].name=muno is unknown; did you mean muon"),
        ({"ndim": 2, "name": "lbfgs"}, r"groups\[0\].name=lbfgs cannot work here: it evaluates"),
        ({"ndim": 2, "name": "muon", "betas": [0.9, 0.9]}, r"groups\[0\].betas is not an option of muon"),
        ({"ndim": 2, "rate": 0.1}, r"groups\[0\].rate is not an option of sgd"),
        ({"lr": 0.1}, r"groups\[0\] must be a mapping with match"),
        ({"ndim": 2}, r"groups\[0\] has no effect"),
        ({"ndim": 2, "name": ["a"]}, r"groups\[0\] must map names to values"),
    ],
)
def test_problems_of_groups(group: dict, message: str) -> None:
    section, _ = resolve_options("optimizer", {"name": "sgd", "groups": [group]}, OPTIMIZERS, COMMON_OPTIONS)
    (problem,) = check_optimizer(section)
    assert re.search(message, problem)


def test_fused_where_it_exists_and_no_scaler_looks_first() -> None:
    section, _ = resolve_options("optimizer", {"name": "adam"}, OPTIMIZERS, COMMON_OPTIONS)
    assert build_optimizer(section, model()).param_groups[0]["fused"] is True
    assert build_optimizer(section, model(), has_scaler=True).param_groups[0]["fused"] is None
    assert build_optimizer(section | {"fused": False}, model()).param_groups[0]["fused"] is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "adamw", "groups": [{"ndim": 2, "betas": [0.9, 2.0]}]}, "Invalid beta parameter"),
        ({"name": "sgd", "groups": [{"ndim": 2, "nesterov": True}]}, "Nesterov momentum requires"),
        ({"name": "sgd", "groups": [{"match": "*", "name": "adam"}]}, "leave none for optimizer.name=sgd"),
        ({"name": "nadam", "differentiable": True}, "differentiable=true cannot work"),
        ({"name": "nadam", "capturable": True}, "capturable=true cannot work on a CPU"),
    ],
)
def test_groups_are_held_to_what_their_optimizer_takes(given: dict, message: str) -> None:
    section, problems = resolve_options("optimizer", given, OPTIMIZERS, COMMON_OPTIONS)
    assert not problems + check_optimizer(section)
    with pytest.raises(InputError, match=message):
        build_optimizer(section, model())


def test_a_group_with_a_decay_of_its_own_means_it() -> None:
    given = {"name": "adamw", "groups": [{"ndim": 1, "weight_decay": 0.1}]}
    section, _ = resolve_options("optimizer", given, OPTIMIZERS, COMMON_OPTIONS)
    assert not check_optimizer(section)
    found = [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in build_optimizer(section, model()).param_groups]
    assert found == [(0.1, {1}), (0.01, {2})]


def test_a_group_reaches_what_is_set_up_once() -> None:
    given = {"name": "adagrad", "groups": [{"ndim": 2, "initial_accumulator_value": 5.0}]}
    section, _ = resolve_options("optimizer", given, OPTIMIZERS, COMMON_OPTIONS)
    assert not check_optimizer(section)
    net = model()
    state = build_optimizer(section, net).state_dict()["optimizers"][0]["state"]
    assert all((values["sum"] == 5.0).all() for values in state.values())


def test_rprop_does_not_follow_a_schedule() -> None:
    section, _ = resolve_options("optimizer", {"name": "rprop"}, OPTIMIZERS, COMMON_OPTIONS)
    assert not check_schedule_has_effect(section, {"name": "constant", "warmup": None})
    assert "no effect" in check_schedule_has_effect(section, {"name": "cosine", "warmup": None})[0]


def test_filter_muon() -> None:
    """Against the iteration written out for one matrix at a time, in float64, on filters of two shapes."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Conv2d(a, b, 3, bias=False) for a, b in ((2, 4), (4, 4), (4, 60)))).double()
    section = {"name": "filter_muon", "lr": 0.1, "momentum": 0.6, "ns_steps": 3, "renormalize": True, "nesterov": True}
    optimizer = build_optimizer(DEFAULTS | section | {"weight_decay": 0.01, "decay_biases_and_norms": True}, net)
    expected = [layer.weight.detach().clone() for layer in net]  # type: ignore[union-attr]
    velocity = [torch.zeros_like(weight) for weight in expected]
    for _ in range(3):
        gradients = [torch.randn_like(weight) for weight in expected]
        for place, (layer, gradient) in enumerate(zip(net, gradients, strict=True)):
            layer.weight.grad = gradient.clone()
            velocity[place] = 0.6 * velocity[place] + gradient
            x = (gradient + 0.6 * velocity[place]).flatten(1)
            x = x / (x.norm() + 1e-7)
            for _ in range(3):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            weight = expected[place]
            weight = weight * len(weight) ** 0.5 / weight.norm()
            expected[place] = weight * (1 - 0.1 * 0.01) - 0.1 * x.view_as(weight)
        optimizer.step()
        for layer, weight in zip(net, expected, strict=True):
            torch.testing.assert_close(layer.weight, weight, rtol=1e-9, atol=1e-12)


def test_filter_muon_takes_filters_of_one_shape_together() -> None:
    """The momentum, its sums with the gradients, and the update; no decay by 0."""
    from torch.profiler import ProfilerActivity, profile

    filters = [torch.nn.Parameter(torch.ones(4, 2, 3, 3)) for _ in range(3)]
    optimizer = FilterMuon(filters, 0.1, 0.6, True, ns_steps=3, renormalize=False, weight_decay=0.0)
    for each in filters:
        each.grad = torch.ones_like(each)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    names = [event.name for event in profiled.events()]
    # v <- momentum v; v <- v + g, and w <- w - lr u; g + momentum v
    counts = [names.count(f"aten::_foreach_{name}") for name in ("mul_", "add_", "add")]
    assert counts == [1, 2, 1]


def test_filter_muon_renormalizes_and_leaves_filters_of_zeros_finite() -> None:
    filters = [torch.nn.Parameter(torch.zeros(4, 2, 3, 3)), torch.nn.Parameter(torch.ones(4, 2, 3, 3))]
    optimizer = FilterMuon(filters, 0.0, 0.6, True, ns_steps=3, renormalize=True, weight_decay=0.0)
    for each in filters:
        each.grad = torch.ones_like(each)
    optimizer.step()
    assert [each.norm().item() for each in filters] == pytest.approx([0, 2])  # sqrt(4)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (6, 8)])
def test_orthogonalize_moves_singular_values_by_the_quintic(shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(1)), full_matrices=False
    )
    values = torch.tensor([1.0, 0.5, 0.2, 0.05, 0.01, 0.001])
    matrix = (left * values) @ right
    expected = values / values.norm()
    for _ in range(3):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    moved = left.T @ orthogonalize(matrix[None], 3)[0] @ right.T
    torch.testing.assert_close(moved.diagonal(), expected, rtol=1e-4, atol=0)
    assert (moved - torch.diag(moved.diagonal())).abs().max() < 2e-5


def test_orthogonalize_keeps_directions_and_evens_out_lengths() -> None:
    matrix = torch.randn(1, 6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix[0], full_matrices=False)
    inner = u.T @ orthogonalize(matrix, 5)[0] @ v.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-9
    assert 0.6 < inner.diagonal().min() < inner.diagonal().max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 5, 12, 20])
def test_orthogonalize_bears_singular_values_of_0(steps: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(64, 8, generator=generator) @ torch.randn(8, 576, generator=generator)
    assert torch.linalg.matrix_norm(orthogonalize(matrix[None], steps, dtype)[0], 2) < 1.3


def test_orthogonalize_in_bf16_is_near_float32_for_large_matrices() -> None:
    matrices = torch.randn(2, 256, 2304, generator=torch.Generator().manual_seed(1))
    exact = orthogonalize(matrices, 3)
    assert (orthogonalize(matrices, 3, torch.bfloat16) - exact).norm() < 2**-6 * exact.norm()


@pytest.mark.parametrize(
    ("asked", "precision", "taken"),
    [("auto", "bf16", "bf16"), ("auto", "fp32", "fp32"), ("fp32", "bf16", "fp32"), ("bf16", "fp32", "bf16")],
)
def test_filter_muon_iterates_in_the_format_of_the_training(asked: str, precision: Precision, taken: str) -> None:
    section = DEFAULTS | {"name": "filter_muon", "lr": 1.0, "momentum": 0.0, "ns_steps": 3, "ns_precision": asked}
    net = torch.nn.Conv2d(8, 16, 3, bias=False)
    optimizer = build_optimizer(section, net, precision=precision)
    before, net.weight.grad = net.weight.detach().clone(), torch.randn_like(net.weight)
    exact = orthogonalize(net.weight.grad.flatten(1)[None], 3)[0].view_as(before)
    optimizer.step()
    error = ((before - net.weight.detach() - exact).norm() / exact.norm()).item()
    assert error < 2**-5
    assert (error > 2**-12) == (taken == "bf16")  # rounded where it should be, and nowhere else


def test_filter_muon_refuses_vectors() -> None:
    with pytest.raises(
        InputError, match=r"parameters of shape \(3,\); give it only the filters, and another optimizer"
    ):
        build_optimizer(
            DEFAULTS
            | {
                "name": "filter_muon",
                "lr": 0.1,
                "momentum": 0.6,
                "ns_steps": 3,
                "renormalize": True,
                "nesterov": True,
                "weight_decay": 0.0,
            },
            model(),
        )


def test_learning_rates_fall_with_depth() -> None:
    """Three layers; the norm belongs to the layer before it. Groups keep their factor on top of their own rate."""
    deep = torch.nn.Sequential(*model(), torch.nn.Linear(2, 2))
    section = DEFAULTS | {"name": "sgd", "lr": 0.8, "weight_decay": 0.1, "layer_decay": 0.5}
    section["groups"] = [{"match": "2.weight", "lr": 8.0}, {"match": "3.bias", "name": "adam", "lr": 0.1}]
    found = {
        name: (round(group["initial_lr"], 9), group["weight_decay"])
        for group in build_optimizer(section, deep).param_groups
        for parameter in group["params"]
        for name, value in deep.named_parameters()
        if value is parameter
    }
    assert found == {
        "0.weight": (0.2, 0.1), "0.bias": (0.2, 0.0), "1.weight": (0.2, 0.0), "1.bias": (0.2, 0.0),
        "2.weight": (4.0, 0.1), "2.bias": (0.4, 0.0), "3.weight": (0.8, 0.1), "3.bias": (0.1, 0.0),
    }  # fmt: skip


def test_layer_decay_is_checked() -> None:
    assert "must be above 0" in check_optimizer(DEFAULTS | {"name": "sgd", "layer_decay": 0.0})[0]
    with pytest.raises(InputError, match="no effect: the model has one layer"):
        build_optimizer(DEFAULTS | {"name": "sgd", "lr": 0.1, "layer_decay": 0.5}, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("group", "problem"), [
    ({"match": "*", "from": "3 years"}, "optimizer.groups[0].from: '3 years' is not a duration"),
    ({"match": "*", "until": "soon"}, "optimizer.groups[0].until: 'soon' is not a duration"),
    ({"until": "3 epochs"}, "must be a mapping with match"),
])  # fmt: skip
def test_until_is_checked(group: dict, problem: str) -> None:
    assert problem in check_optimizer(DEFAULTS | {"name": "sgd", "groups": [group]})[0]


def test_something_must_be_left_to_train() -> None:
    section = DEFAULTS | {
        "name": "sgd",
        "lr": 0.1,
        "groups": [{"ndim": 1, "until": "1 epochs"}, {"ndim": 2, "until": "2 epochs"}],
    }
    with pytest.raises(InputError, match="take every parameter"):
        build_optimizer(section, model())
