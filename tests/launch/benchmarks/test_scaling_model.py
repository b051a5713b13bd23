"""The model of a step's time: its arithmetic, worked out by hand, its limits, and what was published of real machines."""

from itertools import pairwise

import pytest

from shardstep.launch.benchmarks.scaling_model import (
    CLUSTERS,
    WORKLOADS,
    Cluster,
    Link,
    Workload,
    all_reduce_seconds,
    fit_link,
    predict,
    predict_growing,
    ring_seconds,
    tree_seconds,
)

INSIDE, BETWEEN = Link(1.0, 8.0), Link(10.0, 4.0)
PLACE = Cluster(4, INSIDE, BETWEEN, start_s=2.0)


def test_a_ring_sends_an_nth_of_the_bytes_2_n_minus_2_times() -> None:
    assert ring_seconds(64, 4, INSIDE) == 2 * 3 * (1.0 + 64 / 4 / 8.0)  # 6 messages of 16 bytes: 6 (1 + 2) = 18
    assert ring_seconds(64, 1, INSIDE) == 0


def test_a_tree_has_few_latencies_and_sends_all_bytes_twice() -> None:
    assert tree_seconds(64, 5, INSIDE) == 2 * 3 * 1.0 + 2 * 64 / 8.0  # depth 3: 6 + 16 = 22
    assert tree_seconds(64, 1, INSIDE) == 0


def test_an_all_reduce_takes_the_faster_way_between_nodes() -> None:
    assert all_reduce_seconds(64, 1, PLACE) == 2.0
    assert all_reduce_seconds(64, 3, PLACE) == pytest.approx(2 + 4 * (1 + 64 / 3 / 8))  # within a node
    # 2 nodes: ring 2 (10 + 32 / 4) = 36, tree 2 * 10 + 128 / 4 = 52
    assert all_reduce_seconds(64, 8, PLACE) == 2 + 18 + 36
    # 16 nodes, 4 bytes: ring 30 (10 + 1 / 16) = 301.9, tree 2 * 4 * 10 + 2 = 82; inside 6 (1 + 1 / 8)
    assert all_reduce_seconds(4, 64, PLACE) == 2 + 6.75 + 82


def test_one_rank_waits_for_nobody() -> None:
    found = predict(Workload(100, 64, image_s=0.5, fixed_s=3), PLACE, 1)
    assert (found.step_s, found.all_reduce_s, found.efficiency) == (53, 0, 1)


def test_what_is_reduced_after_the_backward_pass_is_waited_for() -> None:
    found = predict(Workload(100, 64, image_s=0.6, fixed_s=3), PLACE, 8)
    assert found.images_per_rank == 13  # of the largest share
    assert found.compute_s == pytest.approx(3 + 13 * 0.6)
    assert found.exposed_s == found.all_reduce_s == 56
    assert found.images_per_s == pytest.approx(100 / (10.8 + 56))
    assert found.efficiency == pytest.approx((3 + 100 * 0.6) / 8 / (10.8 + 56))


def test_buckets_hide_behind_the_backward_pass_but_for_the_last() -> None:
    # 2 buckets of 32 bytes on 4 ranks: 2 + 6 (1 + 1) = 14 each; backward 2/3 of 25 x 0.6 = 10, half of it after the first
    found = predict(Workload(100, 64, image_s=0.6, bucket_bytes=40), PLACE, 4)
    assert found.all_reduce_s == 28
    assert found.exposed_s == pytest.approx(28 - 5)
    # with much computing nothing but the last bucket is seen
    assert predict(Workload(100, 64, image_s=60, bucket_bytes=40), PLACE, 4).exposed_s == 14


def test_a_step_is_not_shorter_than_its_launch() -> None:
    assert predict(Workload(100, 64, image_s=0.01, host_s=4), PLACE, 4).compute_s == 4


def test_more_ranks_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="101 ranks for global batches of 100 images"):
        predict(Workload(100, 64, image_s=1), PLACE, 101)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", WORKLOADS)
def test_efficiency_only_falls(cluster: str, name: str) -> None:
    work, place = WORKLOADS[name], CLUSTERS[cluster]
    kept = [predict(work, place, 2**power).efficiency for power in range(9)]
    growing = [predict_growing(work, place, 2**power).efficiency for power in range(10)]
    assert kept[0] == growing[0] == 1
    for values in (kept, growing):
        assert all(later <= earlier for earlier, later in pairwise(values))


def test_a_link_is_found_again_in_its_own_times() -> None:
    link = Link(5e-6, 2e9)
    seconds = {size: ring_seconds(size, 2, link) for size in (4, 1 << 16, 1 << 24)}
    found = fit_link(seconds, 2)
    assert found.latency_s == pytest.approx(link.latency_s, rel=1e-3)  # 4 bytes take 2 ns on their way
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s, rel=1e-6)


# --- published figures that the parts were not taken from ---------------------------------------------------------------


def test_resnet50_on_the_eight_gpus_of_a_dgx_a100() -> None:
    # NVIDIA DeepLearningExamples: 7,248 images/s in TF32 on eight, whose one gives 938; the model knows of no slow loader
    found = predict_growing(WORKLOADS["resnet50"], CLUSTERS["a100"], 8)
    assert 7248 <= found.images_per_s < 1.05 * 7248


def test_four_megabytes_on_nvlink() -> None:
    # published: 0.10 to 0.15 ms; the model leaves out what a kernel takes to start
    assert 0.05e-3 < all_reduce_seconds(4e6, 8, CLUSTERS["a100"]) < 0.15e-3
