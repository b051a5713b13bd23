"""What counts as a model's blocks and layers."""

import pytest
import torch
import torchvision

from shardstep.trainer.models.blocks import blocks, layer_numbers


@pytest.mark.parametrize(("name", "layers", "same", "last"), [
    ("resnet18", 10, ("conv1.weight", "bn1.weight"), "fc.weight"),
    ("vit_b_16", 14, ("class_token", "conv_proj.weight"), "heads.head.weight"),
    ("convnext_tiny", 23, ("features.1.0.layer_scale", "features.1.0.block.0.weight"), "classifier.2.weight"),
    ("densenet121", 63, ("features.norm0.weight", "features.conv0.weight"), "classifier.weight"),
    ("swin_t", 17, ("features.0.2.weight", "features.0.0.weight"), "head.weight"),
    ("vgg11_bn", 11, ("features.0.weight", "features.1.weight"), "classifier.6.weight"),
])  # fmt: skip
def test_layers_of_torchvisions_models(name: str, layers: int, same: tuple[str, str], last: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    numbers = layer_numbers(model)
    assert list(numbers) == [name for name, _ in model.named_parameters()]
    assert sorted(set(numbers.values())) == list(range(layers))
    assert numbers[same[0]] == numbers[same[1]]
    assert numbers[last] == layers - 1
    assert len(dict(blocks(model))) == len([*blocks(model)])
