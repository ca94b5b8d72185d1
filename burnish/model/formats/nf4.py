"""NF4 (QLoRA, arXiv 2305.14314): 16 levels of a normal distribution, one fp32 absmax for each block of a row.

`nf4_double` holds the absmax of each block in 8 bits. See `code_book.py`.
"""

from burnish.model.formats.code_book import code_book, double_quantized

FORMAT = code_book("nf4")
DOUBLE = double_quantized("nf4")
