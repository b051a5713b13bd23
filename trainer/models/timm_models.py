"""Every classifier of timm by name, as timm/<name>, and what its weights expect of the images."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.trainer.models import TIMM
from shardstep.trainer.models.torchvision_models import refusal


def timm_models(name: str) -> dict[str, Callable[..., nn.Module]]:
    """Return builders of all classifiers of timm, by `timm/<name>`, also with the tags of weights: timm/resnet18.a1_in1k.

    `name`: the one that is looked for, for the message.

    Raises:
        InputError: timm is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise InputError(
            f"model.name={name} is of timm, which is not installed: pip install 'shardstep[timm]'"
        ) from None
    return {TIMM + one: _builder(one) for one in [*timm.list_models(), *timm.list_pretrained()]}


def _builder(name: str) -> Callable[..., nn.Module]:
    def build(
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        pretrained: bool | str = False,
        dropout: float | None = None,
        drop_path: float | None = None,
    ) -> nn.Module:
        """Build a classifier: (B, C, H, W) -> (B, num_classes).

        Args:
            pretrained: whether weights are loaded into it afterwards, see models.COMMON_OPTIONS.
            dropout: share that is dropped before the head; null keeps the model's value.
            drop_path: share of the paths past a block that are dropped (Huang et al. 2016, arXiv 1603.09382); null keeps the
                model's value.

        Raises:
            ValueError: an option has no effect, or the images do not fit.
        """
        net = _create(name, image_shape, num_classes=num_classes, drop_rate=dropout, drop_path_rate=drop_path)
        if reason := refusal(net, image_shape):
            side = data_config(TIMM + name)["input_size"][-1]
            raise ValueError(
                f"images of {image_shape[2]}x{image_shape[1]} pixels do not fit ({reason}): give data.resize={side}"
            )
        return net

    return build


def pretrained_weights(name: str, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Download the weights of a model from the hub, or find them where it keeps them, for images of this shape; by name.

    Raises:
        InputError: they are not available.
    """
    try:
        net = _create(name.removeprefix(TIMM), image_shape, pretrained=True)
    except Exception as error:  # of several libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"model.pretrained=true: the weights of {name} cannot be had ({reason}). Download them where there is a network "
            f"and give model.pretrained=PATH, or train from new weights with model.pretrained=false"
        ) from None
    return net.state_dict()


def data_config(name: str) -> dict[str, Any]:
    """Return what the weights of a model were trained with: input_size (C, H, W), mean, std, interpolation, crop_pct."""
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    assert config is not None, name
    return timm.data.resolve_data_config(pretrained_cfg=config.to_dict())


def _create(name: str, image_shape: tuple[int, int, int], **options: Any) -> nn.Module:
    import timm

    channels, height, width = image_shape
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size and config.input_size[1:] != (height, width):
        options["img_size"] = (height, width)
    options = {key: value for key, value in options.items() if value is not None}
    try:
        return timm.create_model(name, in_chans=channels, **options)
    except TypeError as error:
        raise ValueError(f"it does not take {str(error).rpartition(' ')[2]}") from None
    except (RuntimeError, AssertionError) as error:
        raise ValueError(str(error).splitlines()[0]) from None
