"""One world of several processes: the launcher's environment, Accelerate, DDP, collectives, the launcher's store.

The only room that reads RANK or imports torch.distributed. It imports no other room.
"""
