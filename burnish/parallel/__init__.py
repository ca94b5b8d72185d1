"""Everything that knows of more than one process; the only package that imports torch.distributed.

`world.py` joins and leaves, `launch.py` starts ranks, `shard.py` spreads a model over them, `rows.py` says which rows of a parameter are
here. One process is a world of one: every function here works there without a process group.
"""
