"""The only definition of each stored number format. Importing this package fills the FORMATS table."""

from edge_runtime.engine.formats import (  # noqa: F401  (fills the table)
    fp8,
    int8,
    int8_outlier,
    integer,
    kquant,
    microscaling,
    nf4,
    nf4_double,
    plain,
    trellis,
)
from edge_runtime.engine.formats.record import (
    ENCODINGS,
    FORMATS,
    Array,
    Encoding,
    Format,
    Plane,
    Planes,
    abi_hash,
    get_format,
    register,
)

__all__ = [
    "ENCODINGS",
    "FORMATS",
    "Array",
    "Encoding",
    "Format",
    "Plane",
    "Planes",
    "abi_hash",
    "get_format",
    "register",
]
