"""A model of the time of a training step on N ranks: measured or published parts in, seconds out.

docs/scaling.md explains it. Everything here is arithmetic; `shardstep bench scaling` measures the parts of this machine and
prints what the model says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Link:
    """A way between neighbours: seconds that a message takes however short it is, and bytes per second in one direction."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Cluster:
    """Where ranks run.

    Attributes:
        ranks_per_node: of a full node.
        inside: between two ranks of a node.
        between: between two nodes; all ranks of a node share it.
        start_s: what a collective takes before its first message.
        speed: of a rank's computing, as a multiple of that which the workload was measured on.
    """

    ranks_per_node: int
    inside: Link
    between: Link
    start_s: float
    speed: float = 1.0


@dataclass(frozen=True)
class Workload:
    """What a step has to do.

    Attributes:
        global_batch_size: images of a step over all ranks.
        gradient_bytes: that every rank sends into the reduction, as they travel.
        image_s: seconds that a rank computes per image of its share: forward, backward, and its part of the rest.
        fixed_s: seconds of a step that do not depend on the share: the optimizer.
        host_s: seconds that the host needs to launch a step's work; a step cannot be shorter.
        bucket_bytes: gradients that are reduced together while the backward pass goes on; None: all at once, after it.
    """

    global_batch_size: int
    gradient_bytes: float
    image_s: float
    fixed_s: float = 0.0
    host_s: float = 0.0
    bucket_bytes: float | None = None


@dataclass(frozen=True)
class Prediction:
    """The step of one number of ranks.

    Attributes:
        ranks: in all.
        images_per_rank: the largest share.
        compute_s: of that share.
        all_reduce_s: of all gradients, hidden or not.
        exposed_s: what of it the ranks wait for.
        images_per_s: over all ranks.
        efficiency: images per second and rank, as a share of those of one rank that works alone.
    """

    ranks: int
    images_per_rank: int
    compute_s: float
    all_reduce_s: float
    exposed_s: float
    images_per_s: float
    efficiency: float

    @property
    def step_s(self) -> float:
        """Seconds from one step to the next."""
        return self.compute_s + self.exposed_s


_BACKWARD_SHARE = 2 / 3  # of a pass forward and backward: two products for each of the forward pass


def predict(workload: Workload, cluster: Cluster, ranks: int) -> Prediction:
    """The step of a workload on so many ranks.

    The global batch stays as it is, and is split: the same mathematics on any number of ranks.

    Raises:
        ValueError: there are more ranks than images in a batch.
    """
    if not 1 <= ranks <= workload.global_batch_size:
        raise ValueError(f"{ranks} ranks for global batches of {workload.global_batch_size} images")
    share = math.ceil(workload.global_batch_size / ranks)
    compute_s = compute_seconds(workload, cluster, share)
    reduction_s, exposed_s = 0.0, 0.0
    if ranks > 1:
        buckets = math.ceil(workload.gradient_bytes / (workload.bucket_bytes or workload.gradient_bytes))
        bucket_s = all_reduce_seconds(workload.gradient_bytes / buckets, ranks, cluster)
        backward_s = _BACKWARD_SHARE * share * workload.image_s / cluster.speed
        reduction_s = buckets * bucket_s
        # Gradients come evenly over the backward pass: the last bucket is ready at its end, and hides behind nothing.
        exposed_s = max(bucket_s, reduction_s - backward_s * (buckets - 1) / buckets)
    images_per_s = workload.global_batch_size / (compute_s + exposed_s)
    alone_s = compute_seconds(workload, cluster, workload.global_batch_size)
    efficiency = images_per_s / ranks / (workload.global_batch_size / alone_s)
    return Prediction(ranks, share, compute_s, reduction_s, exposed_s, images_per_s, efficiency)


def predict_growing(workload: Workload, cluster: Cluster, ranks: int) -> Prediction:
    """The same with a global batch that grows with the ranks; efficiency is against one rank with its first share."""
    found = predict(replace(workload, global_batch_size=workload.global_batch_size * ranks), cluster, ranks)
    return replace(found, efficiency=compute_seconds(workload, cluster, workload.global_batch_size) / found.step_s)


def compute_seconds(workload: Workload, cluster: Cluster, images: int) -> float:
    """Seconds of a rank's own work in a step."""
    return max(workload.host_s, (workload.fixed_s + images * workload.image_s) / cluster.speed)


def all_reduce_seconds(num_bytes: float, ranks: int, cluster: Cluster) -> float:
    """Seconds of an all-reduce: a ring inside each node, and between nodes a ring or a tree, whichever is faster."""
    nodes = math.ceil(ranks / cluster.ranks_per_node)
    seconds = cluster.start_s + ring_seconds(num_bytes, min(ranks, cluster.ranks_per_node), cluster.inside)
    if nodes > 1:
        seconds += min(ring_seconds(num_bytes, nodes, cluster.between), tree_seconds(num_bytes, nodes, cluster.between))
    return seconds


def ring_seconds(num_bytes: float, places: int, link: Link) -> float:
    """2 (N - 1) messages one after the other, each of an N-th of the bytes: few bytes, many latencies.

    Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    return 2 * (places - 1) * (link.latency_s + num_bytes / places / link.bytes_per_s)


def tree_seconds(num_bytes: float, places: int, link: Link) -> float:
    """All bytes up a binary tree and down again, in pieces that follow each other: 2 ceil(log2 N) latencies.

    Sanders, Speck and Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan"; NCCL has it.
    """
    if places == 1:
        return 0.0
    return 2 * math.ceil(math.log2(places)) * link.latency_s + 2 * num_bytes / link.bytes_per_s


def fit_link(seconds_of: Mapping[int, float], ranks: int) -> Link:
    """The link that explains measured all-reduces of a ring.

    Args:
        seconds_of: by size in bytes; the smallest gives the latency, the largest the bandwidth.
        ranks: that took part.
    """
    small, large = min(seconds_of), max(seconds_of)
    messages = 2 * (ranks - 1)
    travelled = messages / ranks * (large - small)
    return Link(
        latency_s=seconds_of[small] / messages,
        bytes_per_s=travelled / max(seconds_of[large] - seconds_of[small], 1e-9),
    )


# --- published parts --------------------------------------------------------------------------------------------------

# NCCL's own tuning (github.com/NVIDIA/nccl, src/graph/tuning.cc, protocol Simple): 8.4 us to start, 3.4 us a message on
# NVLink and 9.6 us between nodes, at most 235 GB/s on A100: 78 % of the 300 GB/s per direction of NVIDIA's data sheet. H100:
# 78 % of 450 GB/s; its speed is the ratio of peak bf16 rates, 989 and 312 TFLOP/s, which a small net does not reach.
# 200 Gbit/s are 25 GB/s.
CLUSTERS = {
    "a100": Cluster(8, Link(3.4e-6, 235e9), Link(9.6e-6, 25e9), start_s=8.4e-6),
    "h100": Cluster(8, Link(3.4e-6, 350e9), Link(9.6e-6, 25e9), start_s=8.4e-6, speed=989 / 312),
}
"""Nodes of eight GPUs, 200 Gbit/s between two of them."""

WORKLOADS = {
    # airbench94_compiled on one A100 (github.com/KellerJordan/cifar10-airbench): 3.09 s for 476 steps of 1024 images; 2.0
    # million half-precision gradients. Assumed: 300 kernels a step, which the host launches in 5 us each.
    "record94": Workload(1024, 2 * 2.0e6, 3.09 / 476 / 1024, host_s=300 * 5e-6),
    # The same, captured in a CUDA graph: one launch.
    "record94_captured": Workload(1024, 2 * 2.0e6, 3.09 / 476 / 1024, host_s=20e-6),
    # github.com/NVIDIA/DeepLearningExamples, ResNet-50 v1.5 for PyTorch, one A100 in TF32: 938 images/s; float32 gradients.
    "resnet50": Workload(256, 4 * 25.6e6, 1 / 938, bucket_bytes=25 << 20),
}
"""Published on one A100."""


def prediction_rows(workload: str, cluster: str, ranks: Sequence[int]) -> list[tuple[str, Prediction]]:
    """What a preset gives, with a global batch that is kept, as far as it can be split, and one that grows."""
    work, place = WORKLOADS[workload], CLUSTERS[cluster]
    kept = [("kept", predict(work, place, count)) for count in ranks if count <= work.global_batch_size]
    return kept + [("growing", predict_growing(work, place, count)) for count in ranks]
