"""What fits, before anything is loaded.

`decide.py` is what is called. `bytes.py` counts what stays in memory, `trace.py` what one step needs beside it, `phases.py` adds both up
for each phase of a run, `report.py` says it to a person; `machine.py` is what there is.
"""
