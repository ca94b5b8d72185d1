"""FP4: bitsandbytes' 4-bit float (a sign, 0, and 7 levels from 1/192 to 1), one fp32 absmax for each block of a row.

`fp4_double` holds the absmax of each block in 8 bits. See `code_book.py`.
"""

from burnish.model.formats.code_book import code_book, double_quantized

FORMAT = code_book("fp4")
DOUBLE = double_quantized("fp4")
