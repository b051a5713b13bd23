"""One world of many processes: the launcher's environment, Accelerate, DDP, collectives, the store.

The only room that reads RANK or imports torch.distributed. It imports no other room.
"""
