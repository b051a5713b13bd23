"""One world of several processes. The only room that reads RANK or imports torch.distributed; it imports no other room,
and all but kernels/ may import it.

launchers        the variables of mpirun, srun and submitit under torchrun's names; needs no torch
launch_env       what the launcher's environment says; needs no torch
world            bring a world up and down, build the Accelerator
gradients        how ranks share gradients: DDP's bucket size, one flat buffer, compression
ddp              wrap a model for training
collectives      reductions, broadcasts, and raising on all ranks
bad_images       count and name the images that are skipped on any rank
store            heartbeats and notes in the launcher's store
buffers, lazy_dynamo   batch norm's statistics per rank; torch.compile imported when it is needed
"""
