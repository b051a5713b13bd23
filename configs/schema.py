"""The recipe: every key that a YAML file or a command line can set, with its meaning and unit.

The sections model, loss, optimizer, schedule and average, and each entry of data.augment, are open mappings with a `name`;
their other keys are the keyword arguments of the function with this name, and components.py checks them against its
signature. `shardstep keys` prints the docstrings of the fields.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

Device = Literal["cpu", "cuda"]
DataMode = Literal["resident", "stream"]
OrderVersion = Literal[1, 2]
CropVersion = Literal[1, 2, 3]
Orientation = Literal["follow", "ignore"]
OnBadImage = Literal["stop", "skip"]
Precision = Literal["fp32", "bf16", "fp16"]
MemoryFormat = Literal["contiguous", "channels_last"]
Convolutions = Literal["direct", "winograd", "unfold"]
Views = Literal["plain", "mirror", "mirror_translate"]


@dataclass(frozen=True)
class RunConfig:
    """Where the run is stored, and what makes it reproducible."""

    dir: str = ""
    """Folder of the run. Empty: runs/<run.name>."""
    name: str = ""
    """Name of the run. Empty: the name of the recipe."""
    seed: int = 0
    """Seed of initial weights, sample order, augmentation and dropout. Only dropout also depends on the rank."""
    resume: Literal["if_available", "must", "never"] = "if_available"
    """What to do if run.dir already holds a run. if_available: resume it; must: resume it, or fail if there is none;
    never: start a new run, except after a restart by the launcher, which resumes."""
    allow_changes: list[str] = field(default_factory=list)
    """Keys, such as optimizer.lr, whose values may differ from those of the run that is resumed; data.test allows another
    test set."""
    hang_timeout: Optional[float] = 600  # noqa: UP045
    """Seconds without progress of a rank after which the run ends and writes the stacks of all ranks; null waits forever."""


@dataclass(frozen=True)
class DataConfig:
    """Which samples, in which order, and how they are prepared."""

    train: str = ""
    """Folder of the training shards. Empty: data/<name of data.source>/train, or data/cifar10/train without a source."""
    test: str = ""
    """Folder of the test shards. Empty: data/<name of data.source>/test, or data/cifar10/test without a source. none: there
    is no test set; data.validation or data.fold holds out what the run is evaluated on."""
    source: Optional[str] = None  # noqa: UP045 - OmegaConf reads the field on Python 3.10 too
    """Source that missing shards are written from, each split separately: cifar10, digits, synthetic:N, a data set of
    torchvision, a folder or a file, or an import path (docs/extending.md); see docs/data.md. Not used for shards that
    exist."""
    labels: Optional[str] = None  # noqa: UP045
    """Table of the labels of data.source: a .csv, .tsv, .jsonl, .parquet or .txt file. Its column split, or else the folders
    of data.source, say which rows are test samples; {split} in the path stands for a table each, train and test."""
    image_column: Optional[str] = None  # noqa: UP045
    """Column with the images' names or content, in the table or parquet files; null: the one whose name says so."""
    label_column: Optional[str] = None  # noqa: UP045
    """Column with the labels, in the table or parquet files; null: the one whose name says so, or the only one left. Several,
    separated by commas, hold the share of a class each, such as 0 or 1."""
    label_separator: Optional[str] = None  # noqa: UP045
    """What stands between several labels in the column, such as "|"; rows of one image then add up. null: each image has one
    label, unless the column holds lists."""
    mode: Literal["auto", DataMode] = "auto"
    """Where images are read from. resident: decoded once, kept in RAM or on the device; stream: the shards; auto: resident
    if the images fit."""
    workers: int = 2
    """Number of reader threads per rank in stream mode; 0 reads in the training thread."""
    augment: list[Any] = field(default_factory=list)
    """Transforms, in order: names, or mappings of a name and options, such as [flip, {name: translate, pixels: 2}]. The
    names are the keys of AUGMENTATIONS in datasets/augment; random_resized_crop comes first, mixup and cutmix last."""
    normalize: Any = "manifest"
    """Normalisation of pixel values: manifest (mean and std of the training set), none (0..1), or {mean: [...], std: [...]}
    on the 0..1 scale."""
    resize: Optional[int] = None  # noqa: UP045
    """Pixels that the shorter side is scaled to before the centre square is cut out; null keeps the size of the images. With
    random_resized_crop, whose size is that of the square, this is for evaluation; null is then the size divided by 0.875."""
    crop_version: Literal["auto", CropVersion] = "auto"
    """How images are cut and scaled. 1: as by earlier versions; 2: as by torchvision with Pillow; 3: as 2, from only the
    needed part of a JPEG, less than 1 of 255 apart on average (needs a C compiler and libjpeg); auto: 3 for JPEGs where it
    works, else 2, but a run keeps what it began with."""
    orientation: Literal["auto", Orientation] = "auto"
    """Whether pictures are upright, as EXIF says. follow: they are turned; ignore: they are read as they are stored; auto: as
    the data sets were written, those written from data.source with follow. It must be what existing data sets say."""
    on_bad_image: OnBadImage = "stop"
    """What to do about an image that cannot be decoded although its bytes are those that were written. stop: end the run;
    skip: train on the next sample of the data set in its place, and evaluate on the others; both are counted."""
    lanes: int = 1
    """Number of equal parts of the shuffled order that are read in turn, one sample each; see datasets/order.py."""
    window_shards: Union[int, str] = "auto"  # noqa: UP007
    """Number of shards whose samples are shuffled together. all: an exact uniform shuffle; auto: all if the data set has at
    most 4 GB, else as many shards as hold 4 GB."""
    order_version: Literal["auto", OrderVersion] = "auto"
    """How samples are shuffled, see datasets/order.py. 1: by sorting random words; 2: the same for up to 65,536 samples
    together, by a cipher for more, which starts at once and takes no memory; auto: 2, but a run keeps what it began with."""
    validation: Any = None
    """What is held out to evaluate on during training: a share of the training set, such as 0.1, or a folder of shards. The
    test set is then evaluated once, at the end. null: nothing; the test set is evaluated all along."""
    fold: Optional[str] = None  # noqa: UP045
    """Part of the training set that is held out instead, such as 2/5: the second of five, for cross-validation."""
    split_seed: int = 0
    """Seed of what data.validation or data.fold holds out. Runs with other values of run.seed hold out the same samples."""
    sampling: Any = "uniform"
    """How often samples come. uniform: each once an epoch; balanced: each class equally often; {weights: {cat: 2, dog: 1}}:
    classes in these shares (1 for those without one); {weights: FILE}: each sample by its weight, in a table with the columns
    key and weight (or column: NAME) or an .npy file. An epoch has as many samples as without; see docs/data.md."""
    mix: list[Any] = field(default_factory=list)
    """Data sets to train on together, in place of data.train, such as [{dir: data/photos, weight: 3}, {dir: data/drawings,
    weight: 1}]: 3 of 4 samples are photos. Each set goes through its own epochs; an epoch has as many samples as all sets."""
    repeats: int = 1
    """Number of times that a sample comes in a row, each time with other augmentation (repeated augmentation). An epoch is as
    long as without: with 3 it has a third of the samples, and the next epoch the next third."""
    last_batch: Literal["short", "drop"] = "short"
    """What to do with an epoch's last global batch if it is not full: short trains on it, drop leaves it out."""


@dataclass(frozen=True)
class TrainConfig:
    """The amount of training, its precision and its hardware."""

    global_batch_size: Union[int, str] = 128  # noqa: UP007
    """Samples per optimizer step, over all ranks and micro-steps; full is the entire training set."""
    duration: str = "10 epochs"
    """Length of training in epochs (fractions allowed) or steps, such as 8.5 epochs or 200 steps."""
    precision: Literal["auto", Precision] = "auto"
    """Number format of the forward and backward pass; train.weights sets that of the weights. auto: bf16 or fp16 on a GPU,
    the faster of bf16 and fp32 on a CPU."""
    memory_format: Literal["auto", MemoryFormat] = "auto"
    """Layout of images and convolution weights. auto: channels_last on a GPU, measured with the precision on a CPU."""
    convolutions: Literal["auto", Convolutions] = "auto"
    """Algorithm of 3x3 convolutions with stride 1 on a CPU, in layers where it should be faster. direct: torch's; winograd
    (needs a C compiler) and unfold (weight gradients in bf16) round differently. auto: direct on a GPU, with compile, and if
    contiguous; else winograd if measured as faster with auto precision or memory_format, unfold in bf16 on bf16 units."""
    max_micro_batch: int = 2048
    """Samples in the largest batch of one rank in one backward pass. The number of micro-steps per step follows from it."""
    clip_norm: Optional[float] = None  # noqa: UP045
    """Largest 2-norm of the gradient of all parameters together; a larger gradient is scaled down to it. null: no limit."""
    clip_value: Optional[float] = None  # noqa: UP045
    """Largest absolute value of a gradient element; larger ones are cut to it. null: no limit."""
    device: Literal["auto", Device] = "auto"
    """Kind of device to train on; auto is cuda if there is a GPU, else cpu."""
    threads: Optional[int] = None  # noqa: UP045
    """Largest number of CPU threads of a rank; null takes OMP_NUM_THREADS where no launcher set it, else has no limit. Never
    more than the rank's share of the cores that its machine, CPU affinity and cgroup quota allow."""
    world_size: Optional[int] = None  # noqa: UP045
    """Number of ranks that must come up; null accepts any number."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do when a loss is NaN or infinite. stop: end the run (checked at log steps); skip: skip the step (checked at
    every step, gradients too)."""
    max_skipped_steps: int = 10
    """Largest number of steps that train.on_nan=skip skips; one more ends the run."""
    timeout_s: float = 1800
    """Seconds that a rank waits for the others in a collective before it gives up."""
    weights: Literal["fp32", "half"] = "fp32"
    """Number format of weights, gradients and optimizer state: fp32, or half for that of train.precision, except in batch
    norm and without a loss scaler."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """Mode of torch.compile for the training pass, compiled before the first step; none does not compile. reduce-overhead
    and max-autotune use CUDA graphs on a GPU."""
    all_reduce: Literal["buckets", "flat"] = "buckets"
    """Collectives that average the gradients. buckets: DDP's, during the backward pass; flat: a single one after it."""
    compress: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """Compression of gradients between ranks, for slow networks; different numbers of ranks then agree less closely. none
    is exact."""
    max_wall_s: Optional[float] = None  # noqa: UP045
    """Seconds of training, without evaluations, after which the run ends even if train.duration is not reached; not with the
    schedules cosine, linear and one_cycle. null: no limit."""
    stop_when: Any = None
    """Rule that ends the run before train.duration, such as {metric: loss, on: validation, patience: 3 epochs, min_delta:
    0.001}: at the first evaluation so long after the best one. metric: loss, accuracy, top5, and of several labels map, f1,
    f1_micro; on: validation, or test where there is no validation set. null: no rule."""
    profile: str = ""
    """Range of steps to profile, such as steps 10-20; the profile is written to the run's folder. Empty: none. Profiled
    steps are slower."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation set, or on the test set where there is none."""

    every: str = "1 epochs"
    """Interval between evaluations, in epochs or steps; there is always one at the end."""
    batch_size: int = 500
    """Samples per rank and forward pass; does not change the result."""
    views: Views = "plain"
    """Test-time augmentation. plain: none; mirror: the mean over an image and its mirror image; mirror_translate: half of
    that plus half of the mean over both, shifted twice."""
    sure_above: Optional[float] = None  # noqa: UP045
    """Probability: if the plain view gives one class a higher one, the image gets no further views; null gives all images
    all views."""
    threshold: float = 0.5
    """Probability from which a label counts as found, where images have several: for F1 and for predictions."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saved states of training."""

    every: str = "1 epochs"
    """Interval between checkpoints, in epochs or steps; there is always one at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep, in addition to the one with the best evaluation."""


@dataclass(frozen=True)
class LogConfig:
    """Metrics and where they go."""

    every: str = "50 steps"
    """Interval between train lines in metrics.jsonl, in epochs or steps. Ranks reduce their sums only at these steps."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: disabled, offline (files in the run's folder, to sync later), or online."""
    wandb_project: str = "shardstep"
    """Project in Weights & Biases."""
    wandb_entity: Optional[str] = None  # noqa: UP045
    """Team or user in Weights & Biases; null is your default one."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags of the run in Weights & Biases."""
    sample_keys: bool = False
    """Whether each rank writes the samples it consumes to samples-rankN.jsonl: epoch, step, position and key."""
    grad_norm: bool = False
    """Whether train lines have the 2-norm of the global batch's gradient before clipping; reads all gradients every step."""
    wandb_artifacts: Literal["none", "weights", "checkpoints"] = "none"
    """Files to upload to Weights & Biases: none, weights (the final ones), or checkpoints (the final weights and every
    checkpoint)."""
    tensorboard: bool = False
    """Whether to write the curves for TensorBoard as well, to tensorboard/ in the run's folder."""


@dataclass(frozen=True)
class Recipe:
    """One training run, complete."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """Model: `name` (a key of MODELS in trainer/models/__init__.py, torchvision/<name>, or path/to/file.py:function or
    package.module:function, as everywhere below), its options, and `sync_batch_norm`."""
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "cross_entropy"})
    """Loss: `name` (a key of LOSSES in trainer/optim/losses.py), its options, and `reduction` (mean or sum)."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Optimizer: `name` (see trainer/optim/optimizers.py), its arguments, `groups`, and
    `decay_biases_and_norms` (false exempts them from weight decay)."""
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    """Learning rate schedule: `name` (a key of SCHEDULES in trainer/optim/schedules.py), its options, and `warmup`."""
    average: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    """Average of weights: `name` (none, ema, lookahead; see trainer/optim/average.py) and its options."""
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


OPEN_SECTIONS = ("model", "loss", "optimizer", "schedule", "average")
"""Sections that hold a `name` and the options that come with it."""
