"""How a frozen matrix is held: one file for each format, one row in `FORMATS`.

A format is row-local: `quantize(rows)[a:b]` equals `quantize(rows[a:b])` bit for bit, so that a rank quantizes only its own rows and
the bytes never depend on the number of ranks. A new format is a file like `nf4.py` and a row here; the laws in
`tests/model/test_formats.py` are parametrized over this table.
"""

from burnish.model.formats import gguf_blocks, nf4, none
from burnish.model.formats.base import Format, Tensors

FORMATS: dict[str, Format] = {"none": none.FORMAT, "nf4": nf4.FORMAT, **gguf_blocks.FORMATS}

__all__ = ["FORMATS", "Format", "Tensors"]
