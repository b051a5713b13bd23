"""Bring up the world of a launcher's ranks: processes, devices, threads, and the Accelerator."""

import contextlib
import ctypes
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, patch_environment

from shardstep.configs.errors import InputError, TrainingFailed
from shardstep.configs.schema import TrainConfig
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.lazy_dynamo import defer_compiler
from shardstep.trainer.distributed.meeting import wait_for_store, waiting_aloud

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def choose_device(wanted: str) -> str:
    """Return the device type of train.device: "cpu" or "cuda".

    Raises:
        InputError: the recipe asks for cuda, and there is none.
    """
    if wanted == "cuda" and launch_env.cpu_is_forced():
        raise InputError("train.device=cuda, but accelerate launch is restricted to the CPU: change one of them")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device=cuda, but torch finds no CUDA device here: use train.device=cpu or auto")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and not launch_env.cpu_is_forced() else "cpu"
    return wanted


def start_world(config: TrainConfig) -> PartialState:
    """Bring up the launcher's world, on the device of the recipe.

    Raises:
        InputError: the device is missing, the world has another size than requested, MASTER_ADDR does not resolve, or the
            port is taken.
        TrainingFailed: the ranks did not meet in time.
    """
    defer_compiler()
    device = choose_device(config.device)
    launch_env.check_own_launch(config.world_size)
    if device == "cuda":
        ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if ranks > gpus:
            raise InputError(
                f"{ranks} ranks were started on a node with {gpus} visible GPUs: start at most {gpus} there, and let each "
                f"see all of them (no --gpus-per-task; with submitit set_cuda_visible_devices=False)"
            )
    threads = launch_env.threads_per_rank(os.environ, config.threads)
    timeout = timedelta(seconds=config.timeout_s)
    with contextlib.ExitStack() as stack:
        try:
            if launch_env.is_launched() and not dist.is_initialized():
                wait_for_store(os.environ, config.timeout_s)
                stack.enter_context(waiting_aloud(f"the others to come to {launch_env.meeting_point(os.environ)}"))
            _join_restarted_world(device, timeout)
            with patch_environment(OMP_NUM_THREADS=threads):  # or Accelerate would choose another number, and warn
                # cpu=True is needed: without it, each rank on a machine without CUDA would be a world of one
                world = PartialState(cpu=device == "cpu", timeout=timeout)
        except (dist.DistError, TimeoutError) as error:
            raise _no_meeting(str(error)) from None
    torch.set_num_threads(threads)
    if device == "cpu":
        keep_freed_memory()
        torch.set_flush_denormal(True)  # denormal numbers slow a CPU down 5 to 50 times
        warm_up_vector_math()
    else:
        # Images have few shapes: searching for the fastest convolutions in the first pass of each shape pays off at once.
        torch.backends.cudnn.benchmark = True
    check_world(world)
    return world


def _no_meeting(reason: str) -> InputError | TrainingFailed:
    """Return an error that says why this rank has not met the others."""
    error: InputError | TrainingFailed
    if "EADDRINUSE" in reason:
        port = os.environ["MASTER_PORT"]
        error = InputError(f"port {port} of this machine is taken by another program: set MASTER_PORT to a free one")
    else:
        first_line = reason.strip().splitlines()[0]
        where = launch_env.meeting_point(os.environ)
        error = TrainingFailed(f"rank {launch_env.rank()} did not meet the others at {where}: {first_line}")
    error.everywhere = False
    return error


def _join_restarted_world(device: str, timeout: timedelta) -> None:
    """Bring up a world that torchrun has restarted, under a separate prefix in the agent's store.

    Otherwise torch (2.15) would find the addresses of the dead ranks there, and wait for them.
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
    """Build the Accelerator in the world that `start_world` brought up; precision is fp32, bf16 or fp16.

    fp16 on a CPU uses torch's autocast and scaler directly: Accelerate would silently compute in fp32.
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
            f"Accelerate was set up for {accelerator.distributed_type.value}, but shardstep trains with plain DDP: "
            f"choose it in `accelerate config`, or give the launcher all its options"
        )
    if cpu and precision == "fp16":
        accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def check_world(world: PartialState) -> None:
    """Compare the world that came up with the launcher's.

    Raises:
        InputError: they differ, so that every process would train alone.
    """
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if world.num_processes != expected:
        raise InputError(
            f"the launcher announced {expected} ranks (WORLD_SIZE), but {world.num_processes} came up: the "
            f"backend could not connect them. Check train.device and the launcher's options"
        )


def collective_backends() -> list[str]:
    """Return the collective backends that this torch has, with NCCL's version."""
    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available() and torch.cuda.is_available():
        found.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return found


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory instead of returning it to the system.

    By default a big tensor is mapped when it is created and unmapped when it is freed, and the kernel clears its pages again
    at every step: a third of the time of CPU training. Has no effect with other C libraries.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never trim: beyond a threshold, all but top_pad would be returned at every step
    mallopt(top_pad, 64 << 20)


def warm_up_vector_math() -> None:
    """Call MKL's vector functions once, on one thread.

    If several threads make the first call at once, one of them may take another code path: the first step of Adadelta
    differed in the last bit in 4 of 45 runs on 2 threads, and in none of 45 runs after this (torch 2.15).
    """
    one = torch.ones(1)
    for function in (torch.sqrt, torch.exp, torch.log, torch.tanh, torch.erf, torch.sigmoid):
        function(one)


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the generator of one device; torch.manual_seed would also record a stack for every possible GPU."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def synchronize_device(device: torch.device) -> None:
    """Wait until a GPU has finished its queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def leave_world(accelerator: Accelerator) -> None:
    """Leave the world. Only after success: after an error the other ranks may never come."""
    accelerator.end_training()
