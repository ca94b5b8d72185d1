"""The network: `network.py` first, then `linear.py` and `formats/`, then `head.py` and `attention.py`."""
