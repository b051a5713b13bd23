"""The recipe: every key that a YAML file or a command line can set, with its meaning and unit.

Sections whose choices have arguments of their own (model, loss, optimizer, schedule, average, and each entry of
data.augment) are open mappings with a `name`; the other keys are the keyword arguments of the function that carries this
name, and components.py checks them against its signature.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

Device = Literal["cpu", "cuda"]
DataMode = Literal["resident", "stream"]
Precision = Literal["fp32", "bf16", "fp16"]
MemoryFormat = Literal["contiguous", "channels_last"]
Convolutions = Literal["direct", "winograd", "unfold"]
Views = Literal["plain", "mirror", "mirror_translate"]


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what makes it reproducible."""

    dir: str = ""
    """Folder of the run; empty means runs/<run.name>."""
    name: str = ""
    """Name of the run; empty means the recipe's name."""
    seed: int = 0
    """Seeds initial weights, sample order, augmentation and dropout. Of these, dropout alone depends on the rank, too."""
    resume: Literal["if_available", "must", "never"] = "if_available"
    """When run.dir holds a run: go on with it, insist on one, or begin anew. never: what a launcher restarts goes on."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys, such as optimizer.lr, in which the recipe may differ from that of the run it goes on with, or data.test."""
    hang_timeout: Optional[float] = 600  # noqa: UP045
    """Seconds: if a rank makes no progress for so long, the run ends and writes the stacks of all; null waits for ever."""


@dataclass(frozen=True)
class DataConfig:
    """Which samples, in which order, and how they are prepared."""

    train: str = ""
    """Folder of the training shards; empty means data/<name of the source>/train, without one data/cifar10/train."""
    test: str = ""
    """Folder of the test shards; empty means data/<name of the source>/test, without one data/cifar10/test."""
    source: Optional[str] = None  # noqa: UP045 - OmegaConf reads the field on Python 3.10 too
    """What missing shards are made from, each split for itself: cifar10, digits, synthetic:N, a folder, an archive. Where
    there are shards it is not used."""
    mode: Literal["auto", DataMode] = "auto"
    """resident: decoded once, kept in RAM or on the device; stream: read from the shards; auto: resident if it fits."""
    workers: int = 2
    """Reader threads per rank in stream mode; 0 reads in the training thread."""
    augment: list[Any] = field(default_factory=list)
    """Batch transforms, in order: names (keys of datasets/augment.py's TRANSFORMS), or mappings of a name and arguments."""
    normalize: Any = "manifest"
    """manifest (the training set's mean and std), none (0..1), or {mean: [...], std: [...]} on the 0..1 scale."""
    resize: Optional[int] = None  # noqa: UP045
    """Pixels: the shorter side is scaled to this, then the centre square is cut out. Null keeps the images' size."""
    lanes: int = 1
    """Places of the shuffled line that are read in turn; see datasets/order.py."""
    window_shards: Union[int, str] = "auto"  # noqa: UP007
    """Shards whose samples are shuffled together; all is an exact uniform shuffle; auto: all, or as many as hold 4 GB."""
    last_batch: Literal["short", "drop"] = "short"
    """What becomes of an epoch's last global batch when it is not full: train on it as it is, or leave it out."""


@dataclass(frozen=True)
class TrainConfig:
    """How much, how precisely, on what."""

    global_batch_size: Union[int, str] = 128  # noqa: UP007
    """Samples per optimizer step over all ranks and micro-steps; full is the whole training set."""
    duration: str = "10 epochs"
    """Length of training, in epochs (fractions allowed) or steps."""
    precision: Literal["auto", Precision] = "auto"
    """Of the forward and backward pass; see also weights. auto: bf16 or fp16 on a GPU, the faster of bf16, fp32 on a CPU."""
    memory_format: Literal["auto", MemoryFormat] = "auto"
    """Layout of images and convolution weights. auto: on a GPU channels_last, on a CPU measured with the precision."""
    convolutions: Literal["auto", Convolutions] = "auto"
    """How those of 3x3 and stride 1 train on a CPU, in layers where it should be faster: by winograd (needs a C compiler), or
    weight gradients in bf16 by unfold, both rounded otherwise than torch's; direct: torch's. auto: direct on a GPU, with
    compile, and in contiguous; else winograd if it wins when precision or memory_format is measured, and in bf16 unfold
    where the processor has units."""
    max_micro_batch: int = 2048
    """Samples: the largest batch per rank per backward. The number of micro-steps per step follows from it."""
    clip_norm: Optional[float] = None  # noqa: UP045
    """Largest 2-norm of the whole gradient; longer ones are scaled down to it."""
    clip_value: Optional[float] = None  # noqa: UP045
    """Largest absolute value of a gradient's element; others are cut to it."""
    device: Literal["auto", Device] = "auto"
    """auto is cuda where there is one."""
    world_size: Optional[int] = None  # noqa: UP045
    """Number of ranks that must come up; null accepts any number."""
    on_nan: Literal["stop", "skip"] = "stop"
    """When a loss is NaN or infinite: end the run, or leave out that step; skip looks at every step, stop at log steps."""
    max_skipped_steps: int = 10
    """With on_nan=skip: the run ends at one more."""
    timeout_s: float = 1800
    """Seconds that a rank waits for the others in a collective before it gives up."""
    weights: Literal["fp32", "half"] = "fp32"
    """half keeps weights, gradients and optimizer in the format of train.precision, all but batch norm; no scaler."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """torch.compile's mode for the training pass, compiled before the first step; the last two use CUDA graphs on a GPU."""
    all_reduce: Literal["buckets", "flat"] = "buckets"
    """How ranks share gradients: DDP's buckets, on their way during the backward pass; flat: all at once, after it."""
    compress: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """How gradients travel between ranks; pays on slow networks, and ranks then agree less closely. none is exact."""
    max_wall_s: Optional[float] = None  # noqa: UP045
    """Seconds of training, without evaluations, that end the run if duration does not; not with cosine, linear, one_cycle."""
    profile: str = ""
    """Steps to leave a profile of in the run's folder, such as "steps 10-20"; empty for none. They are slower than others."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the test set."""

    every: str = "1 epochs"
    """Time between evaluations; there is always one at the end."""
    batch_size: int = 500
    """Samples per rank and forward pass. Does not change the result."""
    views: Views = "plain"
    """Test-time augmentation. mirror: the mean over an image and its mirror image; mirror_translate: half that, and half the
    mean over both shifted twice."""
    sure_above: Optional[float] = None  # noqa: UP045
    """Probability: images whose plain view gives a class that much get no further views; null gives them to all."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saved states."""

    every: str = "1 epochs"
    """Time between checkpoints; there is always one at the end."""
    keep: int = 2
    """Number of newest checkpoints that stay on disk, beside the one with the best evaluation."""


@dataclass(frozen=True)
class LogConfig:
    """What is written down."""

    every: str = "50 steps"
    """Time between train lines in metrics.jsonl. Ranks reduce their sums on these steps only."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: disabled, offline (files in the run folder, to be synced later), or online."""
    wandb_project: str = "shardstep"
    """Project in Weights & Biases."""
    wandb_entity: Optional[str] = None  # noqa: UP045
    """Team or user in Weights & Biases; null is your default one."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags in Weights & Biases."""
    sample_keys: bool = False
    """Write what each rank consumes to samples-rankN.jsonl: epoch, step, position and key of every sample."""
    grad_norm: bool = False
    """Give train lines the 2-norm of the global batch's gradient, before clipping. Reads every gradient at each step."""
    wandb_artifacts: Literal["none", "weights", "checkpoints"] = "none"
    """Files for Weights & Biases: none, the final weights, or these and every checkpoint."""
    tensorboard: bool = False
    """Write the curves for TensorBoard, too, below tensorboard/ in the run's folder."""


@dataclass(frozen=True)
class Recipe:
    """One training run, complete."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """name (of trainer/models/__init__.py's MODELS, or torchvision/<name>), that model's options, and `sync_batch_norm`."""
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "cross_entropy"})
    """name (a key of trainer/optim/losses.py's LOSSES), that loss's options, and `reduction` (mean or sum)."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """name (see trainer/optim/optimizers.py), its arguments, `groups`, and `decay_biases_and_norms` (false spares them)."""
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    """name (a key of trainer/optim/schedules.py's SCHEDULES), that schedule's options, and `warmup`."""
    average: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    """name (none, ema, lookahead: see trainer/optim/average.py) and that average's options."""
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


OPEN_SECTIONS = ("model", "loss", "optimizer", "schedule", "average")
"""The sections that hold a name and the options of what it names."""
