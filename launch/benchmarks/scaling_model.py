"""A model of the time of a training step on N ranks: measured or published parts in, seconds out.

docs/scaling.md explains it. Everything here is arithmetic; `shardstep bench scaling` measures the parts on this machine and
prints the predictions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Link:
    """A link between neighbours: latency of a message, and bytes per second in one direction."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Cluster:
    """The machines that ranks run on.

    Attributes:
        ranks_per_node: of a full node.
        inside: link between two ranks of a node.
        between: link between two nodes; all ranks of a node share it.
        start_s: overhead of a collective before its first message.
        speed: of a rank's computing, relative to the device that the workload was measured on.
    """

    ranks_per_node: int
    inside: Link
    between: Link
    start_s: float
    speed: float = 1.0


@dataclass(frozen=True)
class Workload:
    """The work of a step.

    Attributes:
        gradient_bytes: size of each rank's gradients on the wire.
        image_s: compute seconds of a rank per image: forward, backward, and all else that scales with images.
        fixed_s: seconds of a step that do not depend on the number of images: the optimizer.
        host_s: seconds that the host needs to launch a step's kernels; a step cannot be shorter.
        bucket_bytes: size of a bucket that is reduced during the backward pass; None: one all-reduce after it.
    """

    global_batch_size: int
    gradient_bytes: float
    image_s: float
    fixed_s: float = 0.0
    host_s: float = 0.0
    bucket_bytes: float | None = None


@dataclass(frozen=True)
class Prediction:
    """The predicted step on a number of ranks.

    Attributes:
        images_per_rank: the largest number of images of a rank.
        compute_s: compute seconds for these.
        all_reduce_s: seconds of the all-reduce of all gradients, hidden or not.
        exposed_s: the part of all_reduce_s that ranks wait for.
        images_per_s: over all ranks.
        efficiency: images per second and rank, relative to a single rank.
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


_BACKWARD_SHARE = 2 / 3  # of forward and backward: two matrix products for each one of the forward pass


def predict(workload: Workload, cluster: Cluster, ranks: int) -> Prediction:
    """Predict the step on a number of ranks; the global batch is kept and split among them: the same mathematics.

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
        # Gradients arrive evenly over the backward pass; the last bucket is ready at its end, so nothing hides it.
        exposed_s = max(bucket_s, reduction_s - backward_s * (buckets - 1) / buckets)
    images_per_s = workload.global_batch_size / (compute_s + exposed_s)
    alone_s = compute_seconds(workload, cluster, workload.global_batch_size)
    efficiency = images_per_s / ranks / (workload.global_batch_size / alone_s)
    return Prediction(ranks, share, compute_s, reduction_s, exposed_s, images_per_s, efficiency)


def predict_growing(workload: Workload, cluster: Cluster, ranks: int) -> Prediction:
    """Predict with a global batch that grows with the ranks; efficiency is relative to one rank with the original batch."""
    found = predict(replace(workload, global_batch_size=workload.global_batch_size * ranks), cluster, ranks)
    return replace(found, efficiency=compute_seconds(workload, cluster, workload.global_batch_size) / found.step_s)


def compute_seconds(workload: Workload, cluster: Cluster, images: int) -> float:
    """Return the compute seconds of a rank in a step."""
    return max(workload.host_s, (workload.fixed_s + images * workload.image_s) / cluster.speed)


def all_reduce_seconds(num_bytes: float, ranks: int, cluster: Cluster) -> float:
    """Return the seconds of an all-reduce: a ring in each node, then a ring or tree between nodes, whichever is faster."""
    nodes = math.ceil(ranks / cluster.ranks_per_node)
    seconds = cluster.start_s + ring_seconds(num_bytes, min(ranks, cluster.ranks_per_node), cluster.inside)
    if nodes > 1:
        seconds += min(ring_seconds(num_bytes, nodes, cluster.between), tree_seconds(num_bytes, nodes, cluster.between))
    return seconds


def ring_seconds(num_bytes: float, places: int, link: Link) -> float:
    """Return the seconds of a ring: 2 (N - 1) sequential messages of 1/N of the bytes each. Few bytes, many latencies.

    Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    return 2 * (places - 1) * (link.latency_s + num_bytes / places / link.bytes_per_s)


def tree_seconds(num_bytes: float, places: int, link: Link) -> float:
    """Return the seconds of a binary tree: all bytes go up and down again, pipelined. 2 ceil(log2 N) latencies.

    Sanders, Speck and Träff 2009, "Two-tree algorithms for full bandwidth broadcast, reduction and scan"; used by NCCL.
    """
    if places == 1:
        return 0.0
    return 2 * math.ceil(math.log2(places)) * link.latency_s + 2 * num_bytes / link.bytes_per_s


def fit_link(seconds_of: Mapping[int, float], ranks: int) -> Link:
    """Fit a link to measured ring all-reduces.

    Args:
        seconds_of: seconds by size in bytes; the smallest gives the latency, the largest the bandwidth.
        ranks: number of ranks that took part.
    """
    small, large = min(seconds_of), max(seconds_of)
    messages = 2 * (ranks - 1)
    travelled = messages / ranks * (large - small)
    return Link(seconds_of[small] / messages, travelled / max(seconds_of[large] - seconds_of[small], 1e-9))


# NCCL's tuning table (github.com/NVIDIA/nccl, src/graph/tuning.cc, protocol Simple): 8.4 us to start, 3.4 us a message on
# NVLink and 9.6 us between nodes, at most 235 GB/s on A100: 78 % of the 300 GB/s per direction of NVIDIA's data sheet. H100:
# 78 % of 450 GB/s; its speed is the ratio of peak bf16 throughput, 989 and 312 TFLOP/s, which a small net does not reach.
# 200 Gbit/s are 25 GB/s.
CLUSTERS = {
    "a100": Cluster(8, Link(3.4e-6, 235e9), Link(9.6e-6, 25e9), start_s=8.4e-6),
    "h100": Cluster(8, Link(3.4e-6, 350e9), Link(9.6e-6, 25e9), start_s=8.4e-6, speed=989 / 312),
}
"""Nodes of eight GPUs, with 200 Gbit/s between two nodes."""

WORKLOADS = {
    # airbench94_compiled on one A100 (github.com/KellerJordan/cifar10-airbench): 3.09 s for 476 steps of 1024 images; 2.0
    # million half-precision gradients. Assumed: 300 kernels a step, which the host launches in 5 us each.
    "record94": Workload(1024, 2 * 2.0e6, 3.09 / 476 / 1024, host_s=300 * 5e-6),
    # The same, captured in a CUDA graph: one launch.
    "record94_captured": Workload(1024, 2 * 2.0e6, 3.09 / 476 / 1024, host_s=20e-6),
    # github.com/NVIDIA/DeepLearningExamples, ResNet-50 v1.5 for PyTorch, one A100 in TF32: 938 images/s; float32 gradients.
    "resnet50": Workload(256, 4 * 25.6e6, 1 / 938, bucket_bytes=25 << 20),
}
"""Published for one A100."""


def prediction_rows(workload: str, cluster: str, ranks: Sequence[int]) -> list[tuple[str, Prediction]]:
    """Predict a preset with a kept global batch, for at most one rank per image, and with one that grows with the ranks."""
    work, place = WORKLOADS[workload], CLUSTERS[cluster]
    kept = [("kept", predict(work, place, count)) for count in ranks if count <= work.global_batch_size]
    return kept + [("growing", predict_growing(work, place, count)) for count in ranks]
