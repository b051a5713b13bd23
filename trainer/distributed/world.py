"""Bring up the world that a launcher asked for: its ranks, their device and threads, and Accelerate's view of it."""

import ctypes
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from shardstep.configs.errors import InputError
from shardstep.configs.schema import TrainConfig
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.lazy_dynamo import defer_compiler

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def choose_device(wanted: str) -> str:
    """The device type of train.device: "cpu" or "cuda".

    Raises:
        InputError: cuda is asked for and there is none.
    """
    if wanted == "cuda" and launch_env.cpu_is_forced():
        raise InputError("train.device=cuda, but accelerate launch was told to stay on the CPU: change one of them")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device=cuda, but torch finds no CUDA device here: use train.device=cpu or auto")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and not launch_env.cpu_is_forced() else "cpu"
    return wanted


def start_world(config: TrainConfig) -> PartialState:
    """Bring up the world that the launcher asked for, on the device of the recipe.

    Raises:
        InputError: the device is not there, or the world is not the one that was asked for.
    """
    defer_compiler()
    device = choose_device(config.device)
    launch_env.check_launch(os.environ, config.world_size)
    if device == "cuda":
        ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if ranks > gpus:
            raise InputError(
                f"{ranks} ranks were started on a node with {gpus} visible GPUs: start at most {gpus} there"
            )
    threads = launch_env.threads_per_rank(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Accelerate would choose a number of its own, and warn
    timeout = timedelta(seconds=config.timeout_s)
    _join_restarted_world(device, timeout)
    # cpu=True is needed: without it, ranks on a machine without CUDA would each be a world of one
    world = PartialState(cpu=device == "cpu", timeout=timeout)
    if device == "cpu":
        keep_freed_memory()
        torch.set_flush_denormal(True)  # denormal numbers slow a CPU down 5 to 50 times
        torch.set_num_threads(threads)
        warm_up_vector_math()
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
    """Accelerate's view of the world that `start_world` brought up; precision is fp32, bf16 or fp16.

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


def collective_backends() -> list[str]:
    """The backends for collectives that this torch has, with their versions where they tell them."""
    found = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available() and torch.cuda.is_available():
        found.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return found


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


def warm_up_vector_math() -> None:
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


def synchronize_device(device: torch.device) -> None:
    """Wait until a GPU has done what is queued on it; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def leave_world(accelerator: Accelerator) -> None:
    """Leave the world. Only after success: after an error the others may never come."""
    accelerator.end_training()
