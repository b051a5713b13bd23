"""What a recipe adds to the training loss alone, in words: curves of training and test loss differ by it."""

from shardstep.configs.schema import Recipe


def training_extras(recipe: Recipe) -> str:
    """Label smoothing and auxiliary heads, such as "label smoothing of 0.1"; empty where both losses are the same."""
    smoothing, weight = recipe.loss.get("label_smoothing"), recipe.model.get("auxiliary_weight")
    parts = [f"label smoothing of {smoothing:g}"] if smoothing else []
    parts += [f"{weight:g} times the loss of auxiliary heads"] if weight else []
    return " and ".join(parts)
