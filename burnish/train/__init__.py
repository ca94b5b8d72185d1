"""Training: `run.py` is the loop, `step.py` one optimizer step, `checkpoint.py` what a run can be continued from.

The same code runs on one process and on many; nothing here asks which rank it is, but for who writes files.
"""
