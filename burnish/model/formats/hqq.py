"""HQQ (half-quadratic quantization, Badri and Shaji 2023, mobiusml.github.io/hqq_blog): 1, 2, 3, 4 or 8 bits, float zero points, axis 1.

One row of the table for each width. A zero point is held in fp16, which places it to a 256th of a step among up to 16 codes, far below the
rounding of the codes themselves; among 256 codes it would be off by up to a 16th of a step, so `hqq8` holds it in fp32.
"""

import torch

from burnish.model.formats.affine import affine

FORMATS = tuple(affine(f"hqq{bits}", bits, torch.float32 if bits == 8 else torch.float16) for bits in (1, 2, 3, 4, 8))
