"""mixup and cutmix: who is mixed with whom, how much, and what becomes of labels, losses and accuracy."""

import hashlib
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, kstest
from torch.nn import functional

from shardstep.datasets.augment import MixedLabels, Mixing, build_mixing, build_transforms
from shardstep.datasets.augment.mixing import MIXERS, mixup, with_partners
from shardstep.datasets.rng import Draws
from shardstep.trainer.optim.losses import CLASSIFICATION, build_objective
from tests.datasets.augment.test_transforms import draws, images

MIXUP = {"name": "mixup", "alpha": 0.4, "probability": 1.0}
CUTMIX = {"name": "cutmix", "alpha": 1.0, "probability": 1.0}
DIGESTS = {"mixup": "8d6bcff0554c1690", "cutmix": "3eee1c0304c1f928"}


@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), *(st.integers(0, size),) * 2)))
def test_places_are_widened_to_whole_pairs(drawn: tuple[int, int, int]) -> None:
    size, start, stop = drawn[0], *sorted(drawn[1:])
    first, last = with_partners(start, stop, size)
    wanted = {place for own in range(start, stop) for place in (own, own ^ 1) if place < size}
    assert set(range(first, last)) == wanted
    assert not wanted or first % 2 == 0


@given(
    st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), *(st.integers(0, size),) * 2)), st.integers(1, 5)
)
def test_places_are_widened_to_partners_at_a_distance(drawn: tuple[int, int, int], distance: int) -> None:
    size, start, stop = drawn[0], *sorted(drawn[1:])
    first, last = with_partners(start, stop, size, distance)
    partners = [own + distance if own % (2 * distance) < distance else own - distance for own in range(start, stop)]
    wanted = {place for place in (*range(start, stop), *partners) if place < size}
    assert wanted <= set(range(first, last))
    assert first % (2 * distance) == 0 or not wanted
    assert last - first < stop - start + 4 * distance


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 6, 7, 11, 64])
@pytest.mark.parametrize("distance", [2, 3])
def test_copies_in_a_row_are_mixed_with_those_of_another_sample(size: int, distance: int) -> None:
    index = torch.arange(size)
    samples = torch.div(index, distance, rounding_mode="floor")
    levels = (samples * 3 % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 4, 4, 1).clone()
    mixed, labels = mixing(MIXUP, distance=distance)(levels.clone(), samples, Draws(5, 0, index, samples))
    # places 0 and 3, 1 and 4, 2 and 5 of blocks of 6, for a distance of 3
    partners = [place + distance if place % (2 * distance) < distance else place - distance for place in range(size)]
    for place, partner in enumerate(partners):
        if partner >= size:
            assert (labels.partners[place], labels.weights[place]) == (samples[place], 1)
            assert torch.equal(mixed[place], levels[place])
            continue
        assert labels.partners[place] == samples[partner] != samples[place]
        assert labels.weights[place] == labels.weights[partner]
        blend = labels.weights[place] * levels[place, 0, 0, 0] + (1 - labels.weights[place]) * levels[partner, 0, 0, 0]
        assert abs(mixed[place].double().mean() - blend) < 0.51
    assert size < 2 * distance or len(set(labels.weights.tolist())) >= distance  # each copy has a weight of its own


def mixing(*sections: dict[str, Any], distance: int = 1) -> Mixing:
    found = build_mixing([{"name": "flip", "probability": 0.5}, *sections], distance)
    assert found
    return found


@pytest.mark.parametrize("name", MIXERS)
def test_each_mixer_draws_and_does_what_it_did(name: str) -> None:
    mixed, labels = mixing({"name": name, "alpha": 0.7, "probability": 0.9})(
        images(64, 12, 11), torch.arange(64), draws()
    )
    content = mixed.numpy().tobytes() + labels.weights.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("sections", [[MIXUP], [CUTMIX], [MIXUP, CUTMIX]])
@pytest.mark.parametrize("size", [0, 1, 2, 9, 64])
def test_neighbours_are_mixed_and_the_last_of_an_odd_number_is_not(sections: list[dict], size: int) -> None:
    # Images of one level each: what is mixed in comes from the partner alone.
    levels = torch.arange(size, dtype=torch.uint8) * 3
    mixed, labels = mixing(*sections)(
        levels.view(-1, 1, 1, 1).repeat(1, 8, 8, 3), torch.arange(size), draws(count=size)
    )
    assert labels.own.tolist() == list(range(size))
    assert labels.partners.tolist() == [min(place ^ 1, size - 1) for place in range(size)]
    weights = labels.weights.double()
    if size % 2:
        assert weights[-1] == 1
    assert torch.equal(weights[: size // 2 * 2 : 2], weights[1::2])
    # one level in a mean is the rounding of mixup
    expected = weights * levels + (1 - weights) * levels[labels.partners]
    assert (mixed.double().mean(dim=(1, 2, 3)) - expected).abs().max().item() < 0.51 if size else True


@pytest.mark.parametrize("alpha", [0.5, 1.0, 8.0])
def test_weights_are_beta_distributed(alpha: float) -> None:
    index = torch.arange(4000)
    numbers = Draws(5, 0, index, index).uniform_on_host(columns=4)
    _, weights = mixup(torch.zeros(4000, 2, 1, 1, 1, dtype=torch.uint8), numbers, alpha=alpha)
    assert (
        kstest(weights.numpy(), beta(alpha, alpha).cdf).statistic < 0.025
    )  # 1 % of samples are above 1.63 / sqrt(4000)


def test_both_get_half_of_the_pairs_and_their_own_share_of_it() -> None:
    count = 4000
    index, noise = torch.arange(count), images(count, 6, 6)
    mixed, labels = mixing(MIXUP | {"probability": 0.5}, CUTMIX)(noise.clone(), index, Draws(5, 0, index, index))
    unmixed = (labels.weights == 1).view(-1, 2)[:, 0]
    values = mixed.view(-1, 2, 6 * 6 * 3)
    # of cutmix each value is one of the pair's
    swapped = (values.sort(1).values == noise.view(-1, 2, 6 * 6 * 3).sort(1).values).all(dim=(1, 2)) & ~unmixed
    kinds = Counter(
        ("unmixed" if plain else "cutmix" if box else "mixup") for plain, box in zip(unmixed, swapped, strict=True)
    )
    # half of 2000 pairs are mixup's, and half of these are left; of cutmix's some boxes are empty. 5 sigma = 5 sqrt(2000/4)
    assert abs(kinds["mixup"] - 500) < 110
    assert 700 < kinds["cutmix"] <= 1000 + 110
    assert sum(kinds.values()) == 2000


def test_a_pair_draws_other_numbers_than_its_first_image() -> None:
    shared = draws()
    flipped = shared.uniform()[::2, 0]
    assert not torch.isin(shared.of_pairs().uniform_on_host(columns=5), flipped).any()
    assert build_transforms([MIXUP, CUTMIX]) == []  # they come after all transforms, in Mixing


LOSSES: list[dict[str, Any]] = [
    {"name": "cross_entropy", "label_smoothing": 0.0},
    {"name": "cross_entropy", "label_smoothing": 0.2},
    {"name": "nll"},
    {"name": "perceptron"},
    {"name": "binary_cross_entropy", "label_smoothing": 0.1},
    {"name": "asymmetric", "gamma_positive": 1.0, "gamma_negative": 4.0, "margin": 0.05},
    {"name": "focal", "gamma": 2.0},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: " ".join(map(str, loss.values())))
def test_the_loss_is_that_of_both_labels_by_weight(loss: dict[str, Any]) -> None:
    assert {case["name"] for case in LOSSES} == set(CLASSIFICATION)
    generator = torch.Generator().manual_seed(0)
    main, head = (torch.randn(5, 4, generator=generator).log_softmax(1) for _ in range(2))
    labels = MixedLabels(
        torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 0, 3, 2, 0]), torch.tensor([0.3, 0.3, 0.5, 0.5, 1.0])
    )
    objective = build_objective(loss | {"reduction": "mean", "class_weights": "none"}, {"auxiliary_weight": 0.25})
    expected = 0.0
    for outputs, share in ((main, 1.0), (head, 0.25)):
        for row in range(5):
            own, partner = (
                objective.loss(outputs[row : row + 1], main, each[row : row + 1]).item()
                for each in (labels.own, labels.partners)
            )
            expected += share * (labels.weights[row].item() * own + (1 - labels.weights[row].item()) * partner)
    assert objective.loss((main, head), main, labels).item() == pytest.approx(expected, rel=1e-5)
    if loss["name"] == "cross_entropy":
        soft = torch.zeros(5, 4).scatter_add_(1, labels.own[:, None], labels.weights[:, None])
        soft.scatter_add_(1, labels.partners[:, None], 1 - labels.weights[:, None])
        theirs = functional.cross_entropy(main, soft, reduction="sum", label_smoothing=loss["label_smoothing"])
        assert objective.loss(main, main, labels).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_accuracy_counts_the_heavier_label() -> None:
    labels = MixedLabels(torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1]), torch.tensor([0.49, 0.5, 0.51]))
    assert labels.heavier.tolist() == [1, 0, 0]  # of equal weights, its own
    objective = build_objective({"name": "cross_entropy", "reduction": "mean"}, {})
    assert objective.correct(torch.tensor([[0.0, 1.0]] * 3), labels) == 1
