"""Two convolutions with batch norm, and a linear layer."""

from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self, channels: int, num_classes: int, width: int, dropout: float):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        features = self.second(self.first(images))  # (B, C, H, W) -> (B, width, h, w)
        return self.head(features.mean(dim=(2, 3)))  # -> (B, K)


def net(image_shape: tuple[int, int, int], num_classes: int, *, width: int = 16, dropout: float = 0.0) -> nn.Module:
    return Net(image_shape[0], num_classes, width, dropout)
