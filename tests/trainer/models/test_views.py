"""Test-time augmentation against a computation by hand."""

import pytest
import torch
from torch import Tensor, nn

from shardstep.trainer.models.views import predict


class Corner(nn.Module):
    """Two logits that depend on where things are: the sums over the left half and over the upper half."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return torch.stack(
            [
                images[..., : images.shape[3] // 2].sum(dim=(1, 2, 3)),
                images[:, :, : images.shape[2] // 2].sum(dim=(1, 2, 3)),
            ],
            dim=1,
        )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_mirror(images: Tensor) -> None:
    model = Corner()
    left, upper = images[..., :3].sum(dim=(1, 2, 3)), images[:, :, :3].sum(dim=(1, 2, 3))
    right = images[..., 3:].sum(dim=(1, 2, 3))
    expected = torch.stack([(left + right) / 2, upper], dim=1)
    torch.testing.assert_close(predict(model, images, "mirror"), expected)


def test_mirror_translate(images: Tensor) -> None:
    """Half the weight for the centred pair, a quarter for each of the two shifted ones."""
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    pairs = [(view, view.flip(3)) for view in (images, padded[..., :6, :6], padded[..., 2:, 2:])]
    model = Corner()
    means = [(model(one) + model(other)) / 2 for one, other in pairs]
    torch.testing.assert_close(predict(model, images, "mirror_translate"), means[0] / 2 + means[1] / 4 + means[2] / 4)


def test_only_images_that_are_not_sure_are_looked_at_again(images: Tensor) -> None:
    model = Corner()
    sure = model(images).softmax(dim=1).amax(dim=1)
    limit = sure.median().item()  # two of five lie below
    every, model.seen = predict(model, images, "mirror_translate"), 0
    found = predict(model, images, "mirror_translate", sure_above=limit)
    assert model.seen == 5 + 2 * 5
    for row, probability in enumerate(sure.tolist()):
        expected = every[row] if probability < limit else model(images)[row]
        torch.testing.assert_close(found[row], expected)


def test_no_images() -> None:
    assert predict(Corner(), torch.zeros(0, 3, 6, 6), "mirror_translate").shape == (0, 2)
