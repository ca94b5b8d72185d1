"""How a frozen matrix is held: one file for each format, one row in `FORMATS`.

A format is row-local: `quantize(rows)[a:b]` equals `quantize(rows[a:b])` bit for bit, so that a rank quantizes only its own rows and
the bytes never depend on the number of ranks. A new format is a file like `nf4.py` and a row here; the laws in
`tests/model/test_formats.py` are parametrized over this table. `ModelConfig.held_as` says which row a config asks for.
"""

from burnish.model.formats import fp4, gguf_blocks, hqq, int4, int8, nf4, none
from burnish.model.formats.base import Format, Tensors

FORMATS: dict[str, Format] = {
    "none": none.FORMAT,
    "nf4": nf4.FORMAT,
    "nf4_double": nf4.DOUBLE,
    "fp4": fp4.FORMAT,
    "fp4_double": fp4.DOUBLE,
    "int8": int8.FORMAT,
    "int8_row": int8.BY_ROW,
    "int4": int4.FORMAT,
    **{form.name: form for form in hqq.FORMATS},
    **gguf_blocks.FORMATS,
}

__all__ = ["FORMATS", "Format", "Tensors"]
