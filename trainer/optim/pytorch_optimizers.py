"""Every optimizer of the package pytorch_optimizer by name, as pytorch_optimizer/<name>."""

from collections.abc import Callable

from torch.optim import Optimizer

from shardstep.configs.errors import InputError

PREFIX = "pytorch_optimizer/"


def pytorch_optimizers(name: str) -> dict[str, Callable[..., Optimizer]]:
    """Return the package's optimizers by `pytorch_optimizer/<name>`, to look a name up in that begins so.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import pytorch_optimizer
    except ModuleNotFoundError:
        raise InputError(
            f"optimizer.name={name} is of a package that is not installed: pip install 'shardstep[pytorch-optimizer]'"
        ) from None
    known = pytorch_optimizer.get_supported_optimizers()
    wanted = name.removeprefix(PREFIX)
    return {
        PREFIX + one: pytorch_optimizer.load_optimizer(one) for one in known if one == wanted or wanted not in known
    }
