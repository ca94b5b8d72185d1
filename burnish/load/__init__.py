"""Reading base models: every tensor on disk finds its place, and no rank reads more than its own rows.

Read the files in this order:

1. `pretrained.py`: what `model.path` names; configuration and tokenizer.
2. `hub.py`: the same for a hub id, downloaded first.
3. `weights.py`: what every reader of weights promises, and the table of readers.
4. `safetensors_reader.py`, then `gguf_header.py`, `gguf_model.py` and `gguf_reader.py`; `disk.py` reads the bytes for all of them.
5. `fingerprint.py`: a name for the content of a base, in seconds.
6. `fill.py`: one pass over the weights: read → quantize → this rank's rows → their place.
7. `cache.py`: quantized rows on disk, for the next start.
"""
