"""Optimizers by name, and which parameter gets which options.

The documents' optimizers have a function each, whose docstring gives the equation and where torch differs from it;
every other one of torch.optim goes by its name in lower case, with its own arguments. In the equations g is the gradient of
the loss with respect to the parameter w, eta the learning rate, and operations on vectors are per element.
"""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardstep.configs.components import check_limits, convert, hint_of, neighbours, options_of
from shardstep.configs.errors import InputError

Parameters = Iterable[dict[str, Any]] | Iterable[nn.Parameter]


def sgd(
    parameters: Parameters,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Stochastic gradient descent; with a global batch of 1, of some, or `full`: the documents' three kinds.

    w <- w - eta g. With momentum mu:  v <- mu v + (1 - dampening) g,  w <- w - eta v.

    The documents keep the rate inside the velocity, v <- mu v - eta g, w <- w + v: the same for a constant rate; torch's
    form applies a changed rate to the whole velocity at once. The first v is g, undampened. With nesterov, the step is
    along g + mu v. Memory: one number per parameter with momentum, none without.
    """
    return torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
    )


def adagrad(
    parameters: Parameters,
    *,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
) -> Optimizer:
    """Rates that shrink with the sum of squared gradients. Duchi et al. 2011, JMLR 12.

    s <- s + g^2,  w <- w - eta g / (sqrt(s) + eps).

    The documents write sqrt(s + eps); torch has eps outside the root. Memory: one number per parameter.
    """
    return torch.optim.Adagrad(
        parameters,
        lr=lr,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        initial_accumulator_value=initial_accumulator_value,
        eps=eps,
    )


def adadelta(
    parameters: Parameters, *, lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0
) -> Optimizer:
    """Steps in the units of past steps, without a rate. Zeiler 2012, arXiv 1212.5701, algorithm 1.

    s <- rho s + (1 - rho) g^2,  d = sqrt(u + eps) / sqrt(s + eps) g,  u <- rho u + (1 - rho) d^2,  w <- w - eta d.

    The documents have no eta: it defaults to 1. Memory: two numbers per parameter.
    """
    return torch.optim.Adadelta(parameters, lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)


def rmsprop(
    parameters: Parameters,
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
) -> Optimizer:
    """Rates by a running mean of squared gradients. Hinton 2012, Coursera lecture 6e.

    s <- alpha s + (1 - alpha) g^2,  w <- w - eta g / (sqrt(s) + eps).

    The documents write sqrt(s + eps) and use alpha = 0.9; torch has eps outside the root and alpha = 0.99.
    Memory: one number per parameter, one more with momentum, one more if centered.
    """
    return torch.optim.RMSprop(
        parameters, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, centered=centered
    )


def adam(
    parameters: Parameters,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
) -> Optimizer:
    """Running means of the gradient and its square, corrected for their start at 0. Kingma and Ba 2014, arXiv 1412.6980.

    m <- b1 m + (1 - b1) g,  s <- b2 s + (1 - b2) g^2,  w <- w - eta (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps).

    As in the documents. weight_decay adds to the gradient, not to the step: see adamw. Memory: two numbers per
    parameter, three with amsgrad.
    """
    return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


def adamw(
    parameters: Parameters,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
) -> Optimizer:
    """Adam whose weight decay bypasses the running means: w <- w - eta weight_decay w, then Adam's step.

    Loshchilov and Hutter 2017, arXiv 1711.05101. Memory: two numbers per parameter, three with amsgrad.
    """
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)


CANNOT_WORK = {
    "lbfgs": "it evaluates the loss several times per step, which the loop does not do",
    "sparseadam": "it needs sparse gradients, which no model here has",
}


def _every_optimizer() -> dict[str, Callable[..., Optimizer]]:
    ours = {function.__name__: function for function in (sgd, adagrad, adadelta, rmsprop, adam, adamw)}
    classes = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    return {**{name: value for name, value in classes.items() if name not in CANNOT_WORK}, **ours}


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = _every_optimizer()

COMMON_OPTIONS: dict[str, tuple[Any, Any]] = {
    "decay_biases_and_norms": (bool, False),
    "groups": (list[Any], []),
}
"""Options of every optimizer: type and default.

decay_biases_and_norms: whether weight_decay also applies to parameters of fewer than two dimensions.
groups: list of {match: pattern of parameter names, or ndim: dimensions, and options such as lr}; the first that fits.
"""


def build_optimizer(section: dict[str, Any], model: nn.Module) -> Optimizer:
    """Build the optimizer that a checked recipe section names, over the trainable parameters of a model.

    Each parameter group keeps its base rate as `initial_lr`; schedules multiply it.

    Raises:
        InputError: the options contradict each other, or a group matches no parameter.
    """
    options = {key: section[key] for key in section if key not in ("name", *COMMON_OPTIONS)}
    try:
        optimizer = OPTIMIZERS[section["name"]](_parameter_groups(section, options, model), **options)
    except ValueError as error:
        raise InputError(f"optimizer.name={section['name']}: {error}") from None
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def check_optimizer(section: dict[str, Any]) -> list[str]:
    """Check optimizer.groups, and convert their options in place; returns the problems."""
    function, problems = OPTIMIZERS[section["name"]], []
    known = options_of(function)
    for place, group in enumerate(section["groups"]):
        where = f"optimizer.groups[{place}]"
        if not isinstance(group, dict) or not {"match", "ndim"} & set(group):
            problems.append(f"{where} must be a mapping with match (a pattern of parameter names) or ndim, not {group}")
            continue
        for key, value in group.items():
            if key not in ("match", "ndim", *known):
                problems.append(f"{where}.{key} is not an option of {section['name']}; {neighbours(str(key), known)}")
                continue
            try:
                group[key] = convert(value, {"match": str, "ndim": int}.get(key) or hint_of(function, key))
                check_limits(key, group[key])
            except ValueError as error:
                problems.append(f"{where}.{key}: {error}")
    decays = [section.get("weight_decay"), *(group.get("weight_decay") for group in section["groups"] if not problems)]
    if section["decay_biases_and_norms"] and not any(decays):
        problems.append("optimizer.decay_biases_and_norms=true has no effect without optimizer.weight_decay")
    return problems


def _parameter_groups(section: dict[str, Any], options: dict[str, Any], model: nn.Module) -> list[dict[str, Any]]:
    """Groups by the first matching entry of `groups`, split once more where weight decay must not reach."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not parameters:
        raise InputError("the model has no trainable parameters")
    entries = [*section["groups"], {"match": "*"}]
    members: list[list[nn.Parameter]] = [[] for _ in entries]
    exempt: list[list[nn.Parameter]] = [[] for _ in entries]
    for name, parameter in parameters.items():
        place = next(place for place, entry in enumerate(entries) if _fits(entry, name, parameter))
        decay = entries[place].get("weight_decay", options.get("weight_decay", 0))
        spared = decay and parameter.ndim < 2 and not section["decay_biases_and_norms"]
        (exempt if spared else members)[place].append(parameter)

    groups = []
    for place, entry in enumerate(entries):
        own = {key: value for key, value in entry.items() if key not in ("match", "ndim")}
        if place < len(section["groups"]) and not members[place] and not exempt[place]:
            raise InputError(
                f"optimizer.groups[{place}] ({entry}) fits none of the model's parameters that is left; "
                f"they are {', '.join(parameters)}"
            )
        if members[place]:
            groups.append({"params": members[place], **own})
        if exempt[place]:
            groups.append({"params": exempt[place], **own, "weight_decay": 0.0})
    return groups


def _fits(entry: dict[str, Any], name: str, parameter: nn.Parameter) -> bool:
    return fnmatchcase(name, entry.get("match", "*")) and entry.get("ndim", parameter.ndim) == parameter.ndim
