"""INT4: codes 0 … 15, an integer zero point 0 … 15 and an fp32 scale for each block of a row, W = (q − z)·s. The format to serve with vLLM.

It is the layout that compressed-tensors (W4A16, asymmetric, group) and AWQ define, and that Marlin kernels read; llama.cpp's Q4_1 holds it
with d = s and m = −z·s. The zero point is an integer while it is solved for, so that nothing is rounded on export: see `solve.py`.
"""

import torch

from burnish.model.formats.affine import affine

FORMAT = affine("int4", 4, torch.uint8)
