"""A trained model, written for others to read. Read the files in this order:

1. `writers.py`: the table of what can be written, and the stage.
2. `fold.py`: d goes into the scales and into B; nothing is requantized.
3. `merge.py`: d ⊙ (W + s·B A) as dense rows, a slab at a time.
4. `adapter_folder.py`, `merged_folder.py` and `gguf_folder.py`: the writers.
   `shards.py` streams tensors to disk, `card.py` says how to read them back.
5. `distance.py`: how far what was written answers from the model that was measured.
"""
