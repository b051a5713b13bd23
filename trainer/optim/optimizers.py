"""Optimizers by name, and which parameters get which options.

Each of the documents' optimizers has a function here, whose docstring gives the equation and how torch differs from it. All
others of torch.optim are available by their lower-case names, with torch's arguments. In the equations g is the gradient of
the loss with respect to the parameter w, eta the learning rate, and operations on vectors are element-wise. Defaults are
torch's. `fused`: torch's kernel that updates all parameters in one pass; None uses it where it exists, unless a scaler must
check the gradients first.
"""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from shardstep.configs.components import check_limits, convert, hint_of, neighbours, options_of, resolve_options
from shardstep.configs.durations import duration_problems
from shardstep.configs.errors import InputError
from shardstep.configs.imported import build, is_import_path, is_place, with_imported
from shardstep.configs.schema import Precision
from shardstep.trainer.models.blocks import layer_numbers
from shardstep.trainer.optim.muon import FilterMuon
from shardstep.trainer.optim.pytorch_optimizers import PREFIX, pytorch_optimizers

Parameters = Iterable[dict[str, Any]] | Iterable[nn.Parameter]


def sgd(
    parameters: Parameters,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    fused: bool | None = None,
) -> Optimizer:
    """Gradient descent; a global batch of 1, of several samples, or `full` gives the documents' three kinds.

    w <- w - eta g. With momentum mu:  v <- mu v + (1 - dampening) g,  w <- w - eta v.

    The documents have the learning rate inside the velocity, v <- mu v - eta g, w <- w + v: the same for a constant learning
    rate. In torch's form, a new learning rate applies to all of the velocity at once. The first v is g, undampened. With
    nesterov, the step is along g + mu v. Memory: one number per parameter with momentum, none without.
    """
    return torch.optim.SGD(
        parameters,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        fused=fused,
    )


def adagrad(
    parameters: Parameters,
    *,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    fused: bool | None = None,
) -> Optimizer:
    """Learning rates that shrink with the sum of squared gradients. Duchi et al. 2011, JMLR 12.

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
        fused=fused,
    )


def adadelta(
    parameters: Parameters, *, lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0
) -> Optimizer:
    """Steps scaled by past steps, without a learning rate. Zeiler 2012, arXiv 1212.5701, algorithm 1.

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
    """Learning rates scaled by a running mean of squared gradients. Hinton 2012, Coursera lecture 6e.

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
    fused: bool | None = None,
) -> Optimizer:
    """Running means of the gradient and its square, corrected for their start at 0. Kingma and Ba 2014, arXiv 1412.6980.

    m <- b1 m + (1 - b1) g,  s <- b2 s + (1 - b2) g^2,  w <- w - eta (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps).

    The same as in the documents. weight_decay adds to the gradient, not to the step: see adamw. Memory: two numbers per
    parameter, three with amsgrad.
    """
    return torch.optim.Adam(
        parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=fused
    )


def adamw(
    parameters: Parameters,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    fused: bool | None = None,
) -> Optimizer:
    """Adam whose weight decay bypasses the running means: w <- w - eta weight_decay w, then Adam's step.

    Loshchilov and Hutter 2017, arXiv 1711.05101. Memory: two numbers per parameter, three with amsgrad.
    """
    return torch.optim.AdamW(
        parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=fused
    )


def filter_muon(
    parameters: Parameters,
    *,
    lr: float = 0.02,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    renormalize: bool = False,
    weight_decay: float = 0.0,
    ns_precision: Literal["auto", "bf16", "fp32"] = "auto",
) -> Optimizer:
    """Muon on matrices and on the filters of convolutions, flattened to (out, in x height x width). Jordan et al. 2024.

    v <- mu v + g,  d = g + mu v (nesterov) or v,  w <- (1 - eta weight_decay) w - eta orthogonal(d).

    orthogonal(U S V^T) is about U V^T, by `ns_steps` Newton-Schulz iterations. `renormalize` scales w to the norm sqrt(out)
    before each step, as the CIFAR-10 speed records do. The iteration's products are in `ns_precision`; auto: bf16 on a GPU
    or if training is in bf16. torch's `muon` takes only matrices. Parameters of one dimension need a second optimizer:
    optimizer.groups. Memory: one number per parameter.
    """
    product_dtype = torch.bfloat16 if ns_precision == "bf16" else torch.float32
    return FilterMuon(parameters, lr, momentum, nesterov, ns_steps, renormalize, weight_decay, product_dtype)


CANNOT_WORK = {
    "lbfgs": "it evaluates the loss several times per step, but the training loop does so once",
    "sparseadam": "it needs sparse gradients, but no model here has any",
}

_REMEDIES = {
    "muon": "give it only the matrices, and another optimizer the rest, as in optimizer.name=adamw "
    "optimizer.groups='[{ndim: 2, name: muon, lr: 0.02}]'; filter_muon takes the filters of convolutions too",
    "filter_muon": "give it only the filters, and another optimizer the rest, as in optimizer.name=sgd "
    "optimizer.groups='[{ndim: 4, name: filter_muon, lr: 0.24}]'",
}
_FUSED_ON_CPU_ONLY = ("adagrad",)


_OURS = (sgd, adagrad, adadelta, rmsprop, adam, adamw, filter_muon)
_TORCHS = [value for value in vars(torch.optim).values() if isinstance(value, type) and issubclass(value, Optimizer)]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    **{value.__name__.lower(): value for value in _TORCHS if value.__name__.lower() not in (*CANNOT_WORK, "optimizer")},
    **{function.__name__: function for function in _OURS},
}

COMMON_OPTIONS: dict[str, tuple[Any, Any]] = {
    "decay_biases_and_norms": (bool, False), "layer_decay": (float, 1.0), "groups": (list[Any], []),
}  # fmt: skip
"""Options of every optimizer: type and default.

decay_biases_and_norms: whether weight_decay also applies to parameters of fewer than two dimensions.
layer_decay: the learning rates of a layer are multiplied by layer_decay ** (layers above it). models/blocks.py says what a
    layer is. Howard and Ruder 2018, arXiv 1801.06146, section 3.2; Bao et al. 2021, arXiv 2106.08254.
groups: list of {match: pattern of parameter names, or ndim: dimensions, and options such as lr}; a parameter belongs to the
    first group that matches. With a `name`, the group has a separate optimizer, with that optimizer's defaults. With `from`,
    a duration, its parameters are frozen before; with `until`, its schedule ends then, and they are frozen from then on.
"""


def optimizers_for(name: Any) -> Mapping[str, Callable[..., Optimizer]]:
    """Return the optimizers to look a name up in; other packages are imported only for a name that is theirs.

    Raises:
        InputError: the package is not installed.
    """
    if isinstance(name, str) and name.startswith(PREFIX):
        return pytorch_optimizers(name)
    return with_imported(OPTIMIZERS, name)


_SELECTORS = ("match", "ndim")
_GROUP_KEYS: dict[str, Any] = {"match": str, "ndim": int, "from": str, "until": str}
_TIMES = ("from", "until")


class CombinedOptimizer(Optimizer):
    """Several optimizers that step together, each on different parameters; `param_groups` holds the groups of all."""

    def __init__(self, optimizers: list[Optimizer]):
        self.parts = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], defaults={})

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # the loop passes no closure
        for optimizer in self.parts:
            optimizer.step()

    def train(self) -> None:
        """Put back the weights of training in those optimizers that evaluate others."""
        for optimizer in filter(evaluates_other_weights, self.parts):
            optimizer.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Put the weights to evaluate in place, in those optimizers that evaluate others than they train."""
        for optimizer in filter(evaluates_other_weights, self.parts):
            optimizer.eval()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["optimizers"]
        if len(saved) != len(self.parts):
            raise ValueError(f"the state is of {len(saved)} optimizers, but there are {len(self.parts)}")
        for optimizer, state in zip(self.parts, saved, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.parts for group in optimizer.param_groups]


def evaluates_other_weights(optimizer: Optimizer | None) -> bool:
    """Return whether an optimizer has train() and eval(), which switch weights, as schedule-free ones have.

    Defazio et al. 2024, arXiv 2405.15682.
    """
    if isinstance(optimizer, CombinedOptimizer):
        return any(map(evaluates_other_weights, optimizer.parts))
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def build_optimizer(
    section: dict[str, Any], model: nn.Module, has_scaler: bool = False, precision: Precision = "fp32"
) -> Optimizer:
    """Build the optimizer of a checked recipe section, for the trainable parameters of a model.

    Each parameter group keeps its base learning rate as `initial_lr`, which schedules multiply. `has_scaler`: whether fp16's
    scaler checks the gradients before a step.

    Raises:
        InputError: the options contradict each other, or a group matches no parameter.
    """
    optimizers = [_build_one(*pair, has_scaler, precision) for pair in _parameter_groups(section, model)]
    optimizer = optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(optimizers)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def options_in_groups(section: dict[str, Any]) -> set[str]:
    """Return the keys of parameter groups that the recipe decides; what else an optimizer keeps there is its state."""
    given = {key for entry in (section, *section["groups"]) for key in entry}
    return (given | {"lr", "weight_decay", "initial_lr"}) - {"name", *_SELECTORS, *COMMON_OPTIONS}


def check_optimizer(section: dict[str, Any]) -> list[str]:
    """Check optimizer.groups and convert their options in place; return the problems."""
    problems = _lacking_lr("optimizer", section)
    for place, group in enumerate(section["groups"]):
        where = f"optimizer.groups[{place}]"
        if not isinstance(group, dict) or not set(_SELECTORS) & set(group):
            problems.append(f"{where} must be a mapping with match (a pattern of parameter names) or ndim, not {group}")
        else:
            section["groups"][place], found = _check_group(where, group, section["name"])
            problems += found
    if not 0 < section["layer_decay"] <= 1:
        problems.append(f"optimizer.layer_decay={section['layer_decay']} must be above 0 and at most 1")
    decays = [section.get("weight_decay"), *(group.get("weight_decay") for group in section["groups"] if not problems)]
    if section["decay_biases_and_norms"] and not any(decays):
        problems.append("optimizer.decay_biases_and_norms=true has no effect without optimizer.weight_decay")
    return problems


def check_schedule_has_effect(section: dict[str, Any], schedule: dict[str, Any]) -> list[str]:
    """Return the problems of a checked optimizer section in combination with the schedule."""
    names = {section["name"], *(group.get("name") for group in section["groups"])}
    if "rprop" in names and (schedule["name"] != "constant" or schedule["warmup"]):
        return ["rprop reads lr only at the first step, so a schedule has no effect: use schedule.name=constant"]
    return []


def _check_group(where: str, group: dict[str, Any], main: str) -> tuple[dict[str, Any], list[str]]:
    """Return an entry of optimizer.groups with its options converted, and its problems."""
    if set(group) <= set(_SELECTORS):
        return group, [f"{where} has no effect: {group} has no option, such as lr"]
    if str(group.get("name")) in CANNOT_WORK:
        return group, [f"{where}.name={group['name']} cannot work here: {CANNOT_WORK[group['name']]}"]
    problems = duration_problems({f"{where}.{key}": group[key] for key in _TIMES if key in group})
    if is_import_path(group.get("name")) and not is_place(group["name"]):
        return group, problems
    if "name" in group:
        own = {key: (hint, None) for key, hint in _GROUP_KEYS.items() if key in group}
        section, found = resolve_options(where, group, optimizers_for(group["name"]), own)
        return section, problems + (found or _lacking_lr(where, section))
    function = optimizers_for(main)[main]
    known, converted = options_of(function), {}
    for key, value in group.items():
        if key not in (*_GROUP_KEYS, *known):
            problems.append(
                f"{where}.{key} is not an option of {main}; {neighbours(str(key), [*known, 'name', *_TIMES])}"
            )
            continue
        try:
            converted[key] = convert(value, _GROUP_KEYS.get(key) or hint_of(function, key))
            check_limits(key, converted[key], known.get(key))
        except ValueError as error:
            problems.append(f"{where}.{key}: {error}")
    return converted, problems


def _lacking_lr(where: str, section: dict[str, Any]) -> list[str]:
    if "lr" in section or not is_import_path(section["name"]):
        return []
    return [f"{where}.name={section['name']} has no option lr: an optimizer needs one, which schedules multiply"]


def _build_one(
    options: dict[str, Any], groups: list[dict[str, Any]], has_scaler: bool, precision: Precision
) -> Optimizer:
    name = options["name"]
    arguments = {key: value for key, value in options.items() if key not in ("name", *_GROUP_KEYS, *COMMON_OPTIONS)}
    if is_import_path(name):
        optimizer = build(f"optimizer.name={name}", name, groups, **arguments)
        if not isinstance(optimizer, Optimizer) or any("lr" not in group for group in optimizer.param_groups):
            raise InputError(
                f"optimizer.name={name} returned {type(optimizer).__name__}: an optimizer is a function of (parameters), "
                f"which are parameter groups, that returns a torch.optim.Optimizer with an `lr` in each group"
            )
        return optimizer
    on_cpu = groups[0]["params"][0].device.type == "cpu"
    for key in ("differentiable", *(["capturable"] if on_cpu else [])):
        if arguments.get(key):
            raise InputError(
                f"optimizer.{key}=true cannot work {'on a CPU' if key == 'capturable' else 'here'}: leave it out"
            )
    # Otherwise it stays None, and torch chooses between its loop and its foreach kernels.
    can_fuse = not has_scaler and (on_cpu or name not in _FUSED_ON_CPU_ONLY)
    if can_fuse and "fused" in arguments and arguments["fused"] is None and not arguments.get("foreach"):
        arguments["fused"] = True
    if arguments.get("ns_precision") == "auto" and (precision == "bf16" or not on_cpu):
        arguments["ns_precision"] = "bf16"
    refusals = (
        ValueError,
        RuntimeError,
        *((TypeError, AttributeError, ImportError) if name.startswith(PREFIX) else ()),
    )
    try:
        optimizer = optimizers_for(name)[name](groups, **arguments)
    except refusals as error:
        remedy = f"; {_REMEDIES[name]}" if name in _REMEDIES else ""
        raise InputError(f"optimizer.name={name}: {error}{remedy}") from None
    if any("lr" not in group for group in optimizer.param_groups):
        raise InputError(
            f"optimizer.name={name} cannot work here: it has no learning rate, which the schedule would set"
        )
    return optimizer


def _parameter_groups(section: dict[str, Any], model: nn.Module) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return the options of each entry of `groups`, and of the rest, with the parameter groups for torch.

    A parameter belongs to the first entry that matches. Parameters without weight decay get a group of their own, and so do
    those of each layer if their learning rates differ.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not parameters:
        raise InputError("the model has no trainable parameters")
    entries = [*section["groups"], {"match": "*"}]
    factors = _layer_factors(model, section["layer_decay"])
    members: list[dict[tuple[bool, float], list[nn.Parameter]]] = [{} for _ in entries]  # by spared decay and factor
    for name, parameter in parameters.items():
        place = next(place for place, entry in enumerate(entries) if _fits(entry, name, parameter))
        # A group that gives a weight_decay means it, whatever its parameters are.
        inherits = "weight_decay" not in entries[place]
        decay = inherits and section.get("weight_decay", 0) and "name" not in entries[place]
        spared = bool(decay) and parameter.ndim < 2 and not section["decay_biases_and_norms"]
        members[place].setdefault((spared, factors[name]), []).append(parameter)

    chosen = []
    for place, entry in enumerate(entries):
        own = {key: entry[key] for key in _TIMES if key in entry}
        options = entry if "name" in entry else section | entry
        groups: list[dict[str, Any]] = [
            {"params": members[place][spared, factor], **own}
            | ({"weight_decay": 0.0} if spared else {})
            | ({"lr": options["lr"] * factor} if factor != 1 else {})
            for spared, factor in sorted(members[place], key=lambda key: key[0])
        ]
        if groups:
            chosen.append((options, groups))
        elif place < len(section["groups"]):
            raise InputError(
                f"optimizer.groups[{place}] ({entry}) matches no parameter that earlier groups do not have; the model's "
                f"parameters are {', '.join(parameters)}"
            )
        else:
            raise InputError(
                f"optimizer.groups take every parameter and leave none for optimizer.name={section['name']}: remove the last "
                f"group and give its options to the section optimizer"
            )
    return chosen


def _layer_factors(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factor of each parameter's learning rate, by name."""
    numbers = layer_numbers(model)
    last = max(numbers.values())
    if layer_decay != 1 and not last:
        raise InputError(f"optimizer.layer_decay={layer_decay} has no effect: the model has one layer")
    return {name: layer_decay ** (last - number) for name, number in numbers.items()}


def _fits(entry: dict[str, Any], name: str, parameter: nn.Parameter) -> bool:
    return fnmatchcase(name, entry.get("match", "*")) and entry.get("ndim", parameter.ndim) == parameter.ndim
