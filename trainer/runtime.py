"""The world: ranks, device, threads and precision. The only module that builds the Accelerator or imports
torch.distributed; what the launcher said is read here and in launcher.py.
"""

import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from shardstep.configs.errors import InputError
from shardstep.configs.schema import TrainConfig
from shardstep.trainer import launcher
from shardstep.trainer.eager import defer_compiler
from shardstep.trainer.sharing import (
    GRAPH_MODES,
    POWERSGD_RANK,
    POWERSGD_START,
    FlatGradients,
    bucket_mb,
    gradient_bytes,
    uncompiled,
)

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_DDP_HOOKS = {
    "none": DDPCommunicationHookType.NO,
    "bf16": DDPCommunicationHookType.BF16,
    "fp16": DDPCommunicationHookType.FP16,
    "powersgd": DDPCommunicationHookType.POWER_SGD,
}
_SENT_AS = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_COMPILED_AT_MOST = 256  # graphs of one model: sizes of batches and images, times freezings; torch's limit is 8
_GRAPH_PASSES = 3  # until CUDA graphs are ready: one as it is, one that is recorded, one that finds it good


def choose_device(wanted: str) -> str:
    """The device type of train.device: "cpu" or "cuda".

    Raises:
        InputError: cuda is asked for and there is none.
    """
    if wanted == "cuda" and launcher.cpu_is_forced():
        raise InputError("train.device=cuda, but accelerate launch was told to stay on the CPU: change one of them")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device=cuda, but torch finds no CUDA device here: use train.device=cpu or auto")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and not launcher.cpu_is_forced() else "cpu"
    return wanted


def start(config: TrainConfig) -> PartialState:
    """Bring up the world that the launcher asked for, on the device of the recipe.

    Raises:
        InputError: the device is not there, or the world is not the one that was asked for.
    """
    defer_compiler()
    device = choose_device(config.device)
    launcher.check_launch(os.environ, config.world_size)
    if device == "cuda":
        ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if ranks > gpus:
            raise InputError(
                f"{ranks} ranks were started on a node with {gpus} visible GPUs: start at most {gpus} there"
            )
    threads = launcher.threads_per_rank(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Accelerate would choose a number of its own, and warn
    timeout = timedelta(seconds=config.timeout_s)
    _join_restarted_world(device, timeout)
    # cpu=True is needed: without it, ranks on a machine without CUDA would each be a world of one
    world = PartialState(cpu=device == "cpu", timeout=timeout)
    if device == "cpu":
        keep_freed_memory()
        torch.set_flush_denormal(True)  # denormal numbers slow a CPU down 5 to 50 times
        torch.set_num_threads(threads)
        settle_vector_math()
    else:
        # Images come in few shapes, again and again: the fastest convolutions, found at the first pass of each, pay at once.
        torch.backends.cudnn.benchmark = True
    check_world(world)
    return world


def _join_restarted_world(device: str, timeout: timedelta) -> None:
    """Bring up a world that torchrun has restarted, under names of its own in the agent's store.

    torch (2.15) would find the addresses of the ranks that have died there, and wait for them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt-{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def build_accelerator(precision: str) -> Accelerator:
    """Accelerate's view of the world that `start` brought up; precision is fp32, bf16 or fp16.

    fp16 on a CPU is torch's own autocast and scaler: Accelerate would compute in fp32 without saying so.
    """
    cpu = PartialState().device.type == "cpu"
    half = precision if precision != "fp32" and not (cpu and precision == "fp16") else "no"
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=half,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # whatever the environment says
        step_scheduler_with_optimizer=False,
    )
    if accelerator.distributed_type not in _SUPPORTED:
        raise InputError(
            f"Accelerate was set up for {accelerator.distributed_type.value}, but training is by plain DDP: "
            f"choose it in `accelerate config`, or give the launcher all its options"
        )
    if cpu and precision == "fp16":
        accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def wrap_optimizer(accelerator: Accelerator, optimizer: Optimizer) -> AcceleratedOptimizer:
    """Wrap an optimizer in Accelerate's, which knows the scaler."""
    return accelerator.prepare_optimizer(optimizer)


def wrap_model(
    accelerator: Accelerator,
    module: nn.Module,
    config: TrainConfig,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    batches: list[Tensor],
    before: nn.Module | None = None,
    rehearsed: bool = False,
) -> nn.Module:
    """Wrap a model so that the ranks share its gradients, with autocast, and compile it; the weights are rank 0's. All ranks.

    To be called again when parameters have been frozen, or set free: neither DDP nor a flat buffer notices by itself.

    With several ranks there is one pass whose gradient is thrown away, so that a resumed run adds up gradients in the order
    of the first one: DDP arranges its buckets anew after its first backward pass; from three ranks on, gloo then sums in
    another order.

    Args:
        accelerator: the world.
        module: bare, on its device, without gradients.
        config: the recipe's train section, for all_reduce, compress and compile.
        loss_of: of the model's outputs for images.
        batches: of images; the first for that pass, and one of each shape to come for the compiler.
        before: what the last call gave for this model; it cannot be used any more. Each rank keeps its own buffers then.
        rehearsed: the compiler has met the model with these parameters frozen.
    """
    before = None if before is None or before is module else uncompiled(before)
    own_buffers = [buffer.clone() for buffer in module.buffers()] if before is not None else []
    if isinstance(before, DistributedDataParallel):
        before._remove_autograd_hooks()  # or both would reduce
    _undo_autocast(module)
    _autocast_fp16_on_cpu(accelerator, module)
    alone = accelerator.num_processes == 1
    is_flat = config.all_reduce == "flat" and not alone
    accelerator.ddp_handler = _ddp_options(module, config)
    # Left where it is: to see whether it may be moved, Accelerate would import all of torch's distributed tensors, 0.7 s.
    model = accelerator.prepare_model(module, device_placement=False, evaluation_mode=is_flat)
    if isinstance(model, DistributedDataParallel):
        # Buffers are averaged before evaluation; broadcasting them at every forward pass would cost a collective.
        # The attribute, because the argument's name changes between torch versions.
        model.broadcast_buffers = False
    # It knows a bare model again; a new DDP is new to it.
    compiler_is_ready = rehearsed and not isinstance(model, DistributedDataParallel)
    if config.compile != "none":
        torch._dynamo.config.recompile_limit = _COMPILED_AT_MOST  # beyond it, all is done without the compiler
        model = cast(nn.Module, torch.compile(model, mode=config.compile, dynamic=False))
    if is_flat:
        _broadcast_weights(module)
        model = FlatGradients(model, lambda values: _average(values, _SENT_AS[config.compress]))
    if config.compile != "none" and not compiler_is_ready:
        with_graphs = accelerator.device.type == "cuda" and config.compile in GRAPH_MODES
        for images in batches:
            for _ in range(_GRAPH_PASSES if with_graphs else 1):
                with accelerator.no_sync(model):  # these gradients need not travel
                    _throw_away_a_pass(accelerator, model, loss_of, images)
    if not alone:
        _throw_away_a_pass(accelerator, model, loss_of, batches[0])
    with torch.no_grad():
        for buffer, own in zip(module.buffers(), own_buffers, strict=False):
            buffer.copy_(own)
    return model


def average_gradients(model: nn.Module) -> bool:
    """Share the gradients of a step, unless DDP has done so in its last backward pass. All ranks; returns whether it did."""
    if isinstance(model, FlatGradients):
        model.average_gradients()
    return isinstance(model, FlatGradients)


def _ddp_options(module: nn.Module, config: TrainConfig) -> DistributedDataParallelKwargs:
    """For Accelerate. static_graph stays off: it saves a search for unused parameters that is off already."""
    powersgd = {"matrix_approximation_rank": POWERSGD_RANK, "start_powerSGD_iter": POWERSGD_START}
    return DistributedDataParallelKwargs(
        bucket_cap_mb=bucket_mb(gradient_bytes(module), config.compress),
        gradient_as_bucket_view=True,
        comm_hook=_DDP_HOOKS[config.compress],
        comm_state_option=powersgd if config.compress == "powersgd" else {},
    )


def _broadcast_weights(module: nn.Module) -> None:
    """What DDP does when it wraps: hosts may have computed first weights that differ in their last bits."""
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            sent = value.contiguous()
            dist.broadcast(sent, src=0)
            value.copy_(sent)


def _average(values: Tensor, sent_as: torch.dtype | None) -> None:
    """Replace a tensor by its mean over all ranks; it travels in the format given."""
    sent = values if sent_as is None else values.to(sent_as)
    sent /= dist.get_world_size()  # before the sum, which fp16 might not hold
    dist.all_reduce(sent)
    if sent is not values:
        values.copy_(sent)


def _throw_away_a_pass(
    accelerator: Accelerator, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], images: Tensor
) -> None:
    """Settle the order in which gradients are added up; the model stays as it is."""
    kept = [buffer.clone() for buffer in model.buffers()]
    outputs = model(images)  # alive during the backward pass, as in a step: CUDA graphs are recorded for just that
    accelerator.backward(loss_of(outputs, images))
    del outputs
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), kept, strict=True):
            buffer.copy_(before)
    if isinstance(model, FlatGradients):
        model.lay_out()
    model.zero_grad()


def step(optimizer: AcceleratedOptimizer) -> None:
    """Let an optimizer step, through Accelerate's wrapper only where a scaler is.

    Without one it adds nothing but a search on disk for a library that is not there, twice a step, 0.3 ms (Accelerate 1.15).
    """
    (optimizer if optimizer.scaler is not None else optimizer.optimizer).step()


def exposed_share_s(model: nn.Module) -> float | None:
    """Seconds that DDP's backward pass waits on average for other ranks' gradients, after its own are there; None if alone.

    From the measurements that DDP takes itself of its first ten passes and of one in a hundred after that.
    """
    wrapped = uncompiled(model)
    if not isinstance(wrapped, DistributedDataParallel):
        return None
    measured = wrapped._get_ddp_logging_data()  # times in nanoseconds
    if measured["world_size"] == 1:
        return None
    shared_ns = measured.get("avg_backward_comm_time", 0)
    return max(0, shared_ns - measured.get("avg_backward_compute_comm_overlap_time", 0)) / 1e9


def wrap_for_evaluation(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Put a model on its device, with autocast around its forward pass."""
    _autocast_fp16_on_cpu(accelerator, module)
    return accelerator.prepare_model(module.to(accelerator.device), device_placement=False, evaluation_mode=True)


def _autocast_fp16_on_cpu(accelerator: Accelerator, module: nn.Module) -> None:
    """What Accelerate does for the formats that it supports on a CPU."""
    if accelerator.device.type == "cpu" and accelerator.scaler is not None:
        module.__dict__["_original_forward"] = module.forward
        module.forward = torch.autocast("cpu", torch.float16)(module.forward)


def _undo_autocast(module: nn.Module) -> None:
    """Give a model the forward pass that it had before it was wrapped, and let Accelerate wrap it again."""
    module.__dict__.pop("_is_accelerate_prepared", None)
    original = module.__dict__.pop("_original_forward", None)
    if original is not None:
        module.forward = original


def check_world(world: PartialState) -> None:
    """Compare the world that came up with the launcher's.

    Raises:
        InputError: they differ; every process would train on its own.
    """
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if world.num_processes != expected:
        raise InputError(
            f"the launcher announced {expected} ranks (WORLD_SIZE), but {world.num_processes} came up: the "
            f"backend could not join them. Check train.device and the launcher's options"
        )


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what is queued on it; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed, in place of returning it to the system: as much as was in use at once.

    By default a big tensor is mapped when it is made and unmapped when it is freed, and the kernel clears its pages
    again at every step: a third of a CPU training's time. Other C libraries are left as they are.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never: past a threshold, all but top_pad would go back, at every step
    mallopt(top_pad, 64 << 20)


def settle_vector_math() -> None:
    """Call MKL's vector functions once, on one thread.

    When the first call comes from several threads at once, one of them may take another code path: a first step of Adadelta
    differed in the last bit in 4 of 45 runs on 2 threads, and in none of 45 after this (torch 2.15).
    """
    one = torch.ones(1)
    for function in (torch.sqrt, torch.exp, torch.log, torch.tanh, torch.erf, torch.sigmoid):
        function(one)


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the random numbers of one device; torch.manual_seed would also record a stack for every GPU there might be."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every rank's loss depends on the sum, so what reaches one rank's values is the sum over all ranks' gradients.
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; gradients flow back through it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    return _AllReduceSum.apply(values)


def broadcast_object(world: PartialState, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world.num_processes == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, device=world.device)
    return holder[0]


def raise_together(world: PartialState, problem: InputError | None) -> None:
    """Raise on every rank if any rank has a problem, so that none waits in a collective for one that is gone.

    Raises:
        InputError: with each different message once, and which ranks it came from if not all.
    """
    if world.num_processes == 1:
        if problem:
            raise problem
        return
    messages: list[str | None] = [None] * world.num_processes
    dist.all_gather_object(messages, str(problem) if problem else None)
    ranks_of: dict[str, list[int]] = {}
    for rank, message in enumerate(messages):
        if message is not None:
            ranks_of.setdefault(message, []).append(rank)
    if ranks_of:
        raise InputError(
            "\n".join(
                message if len(ranks) == len(messages) else f"rank {', '.join(map(str, ranks))}: {message}"
                for message, ranks in ranks_of.items()
            )
        )


def agree(world: PartialState) -> Callable[[list[int]], list[int]]:
    """A function that gives the largest of all ranks' numbers, place by place; every rank calls it. On the host."""
    if world.num_processes == 1:
        return lambda numbers: numbers
    # Beside NCCL there is a group for the host's own talk, so that no rank has to wait for its GPU to take part.
    group: Any = dist.new_group(backend="gloo") if world.device.type == "cuda" else None

    def largest(numbers: list[int]) -> list[int]:
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
        return values.tolist()

    return largest


class Board:
    """Notes that ranks leave for each other in the launcher's store, without waiting for one another."""

    def __init__(self, world: PartialState):
        self.rank, self._world_size = world.process_index, world.num_processes
        self._store: dist.Store | None = None
        self._present: set[int] = set()  # ranks whose note has been seen
        if self._world_size > 1:
            self._store = dist.PrefixStore("shardstep", dist.distributed_c10d._get_default_store())

    def exchange(self, note: str) -> dict[int, str]:
        """Leave this rank's note, and read those of all ranks on rank 0, that of rank 0 on the others.

        Two calls to the store, whatever the number of ranks, once each has left a note.
        """
        if self._store is None:
            return {0: note}
        try:
            self._store.set(f"note-{self.rank}", note)
        except RuntimeError:  # the rank or agent that keeps the store is gone: its end will be noticed
            return {self.rank: note}
        return {self.rank: note} | self.read(range(self._world_size) if self.rank == 0 else [0])

    def read(self, ranks: Sequence[int] | None = None) -> dict[int, str]:
        """The notes of some ranks, by default of all; without those that have not left one yet."""
        if self._store is None:
            return {}
        ranks = range(self._world_size) if ranks is None else ranks
        try:
            # A note that is there stays there; asking the store for one that is not would wait for it.
            self._present |= {
                rank for rank in ranks if rank not in self._present and self._store.check([f"note-{rank}"])
            }
            present = [rank for rank in ranks if rank in self._present]
            notes = self._store.multi_get([f"note-{rank}" for rank in present]) if present else []
        except RuntimeError:
            return {}
        return {rank: text.decode() for rank, text in zip(present, notes, strict=True)}

    def claim_verdict(self) -> bool:
        """Whether this rank is the first to call the run hung."""
        if self._store is None:
            return True
        try:
            return self._store.add("verdict", 1) == 1
        except RuntimeError:
            return True

    def verdict(self) -> bool:
        """Whether some rank has called the run hung."""
        try:
            return self._store is not None and self._store.check(["verdict"])
        except RuntimeError:
            return False


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank has left a collective."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def gather_buffers(accelerator: Accelerator, flat: Tensor) -> Tensor | None:
    """The vectors of all ranks as rows on the host; None where there is one rank, or nothing in them. All ranks."""
    if accelerator.num_processes == 1 or not flat.numel():
        return None
    return accelerator.gather(flat.to(accelerator.device).unsqueeze(0)).cpu()


def gather_rows(accelerator: Accelerator, values: Tensor) -> list[list[float]]:
    """A float64 vector of each rank, by rank. All ranks."""
    return accelerator.gather(values.unsqueeze(0)).tolist()


def mean_over_ranks(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks; theirs stays as it is. All ranks."""
    if accelerator.num_processes == 1 or not values.numel():
        return values
    return accelerator.reduce(values, reduction="mean")


def reduce_sums(accelerator: Accelerator, sums: Sequence[Tensor]) -> list[Tensor]:
    """The sums of some float64 tensors over all ranks, in one collective."""
    if accelerator.num_processes == 1:
        return list(sums)
    flat = accelerator.reduce(torch.cat([values.flatten() for values in sums]), reduction="sum")
    return [part.view_as(values) for part, values in zip(flat.split([v.numel() for v in sums]), sums, strict=True)]


def stop(accelerator: Accelerator) -> None:
    """Leave the world. Only after success: after an error the others may never come."""
    accelerator.end_training()


# --- looking at a launch before, and without, its world ---------------------------------------------------------------

_LOOK_AGAIN_S = 0.02


def backends() -> list[str]:
    """The backends for collectives that this torch has, with their versions where they tell them."""
    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available() and torch.cuda.is_available():
        found.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return found


class Meeting:
    """Where the processes of one launch leave notes for each other, before there is a world and if none comes up.

    The notes lie in the store at MASTER_ADDR and MASTER_PORT, which the launcher's agent keeps, or else rank 0.
    """

    def __init__(self, environment: Mapping[str, str], timeout_s: float):
        """
        Raises:
            TimeoutError: nothing listens there in time.
        """
        self._expected = int(environment.get("WORLD_SIZE", "1"))
        self._store: dist.Store | None = None
        self._keeps_store = False
        if self._expected > 1:
            store, self._keeps_store = _open_store(environment, timeout_s)
            self._store = dist.PrefixStore(f"meeting-{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def share(self, topic: str, note: str, timeout_s: float) -> list[str]:
        """Leave a note and wait for the others'; returns those that came in time, in their order, alike for all.

        Who comes when the others have ended their waiting finds no note of its own.

        Raises:
            RuntimeError: the process that keeps the store is gone.
        """
        if self._store is None:
            return [note]
        number = self._store.add(f"{topic}-count", 1)
        self._store.set(f"{topic}-{number}", note)
        deadline = time.monotonic() + timeout_s
        while not self._store.check([f"{topic}-closed"]):
            count = self._store.add(f"{topic}-count", 0)
            if count >= self._expected or time.monotonic() > deadline:
                self._store.compare_set(f"{topic}-closed", "", str(count))  # one of them does it
            time.sleep(_LOOK_AGAIN_S)
        self._expected = count = int(self._store.get(f"{topic}-closed"))  # the others are given up
        return [self._store.get(f"{topic}-{number}").decode() for number in range(1, count + 1)]

    def leave(self, timeout_s: float) -> None:
        """Wait for the others; the process that keeps the store leaves last.

        Raises:
            RuntimeError: it is gone already.
        """
        self.share("leaving", "", timeout_s)
        if self._store is not None:
            left, deadline = self._store.add("left", 1), time.monotonic() + timeout_s
            while self._keeps_store and left < self._expected and time.monotonic() < deadline:
                time.sleep(_LOOK_AGAIN_S)
                left = self._store.add("left", 0)


def _open_store(environment: Mapping[str, str], timeout_s: float) -> tuple[dist.Store, bool]:
    """The store, and whether it is kept by this process."""
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    # multi_tenant: a world that comes up later shares the port
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s), "wait_for_workers": False, "multi_tenant": True}
    if environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        with contextlib.suppress(dist.DistNetworkError):  # the port is taken: by another process that is told rank 0?
            return dist.TCPStore(address, port, is_master=True, **options), True
    deadline = time.monotonic() + timeout_s
    while True:  # TCPStore itself would fill the screen with stacks while it waits
        try:
            socket.create_connection((address, port), timeout=timeout_s).close()
            return dist.TCPStore(address, port, is_master=False, **options), False
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(str(error)) from None
            time.sleep(_LOOK_AGAIN_S)


def time_all_reduce(world: PartialState, num_bytes: int, repeats: int) -> list[float]:
    """Seconds of each of some all-reduces of float32 numbers, after one that is not counted. All ranks."""
    values = torch.zeros(num_bytes // 4, device=world.device)
    seconds = []
    for _ in range(1 + repeats):
        world.wait_for_everyone()
        began = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds[1:]
