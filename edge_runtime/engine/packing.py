"""Packings: the byte order of a format's planes for one family of kernels. A packing never changes a value.

rows
    Planes exactly as the format's codec gives them, C order, flattened.

n16k4 (integer formats: encodings u4o8, u4, i8) and n16 (float and table formats), for the cpu backend
    Rows are padded to panels of 16 with zero weights, columns to whole groups: `G` = the format's group, or
    64 when scales are per row or per tensor or absent. panels = ceil(rows/16), groups = ceil(cols/G).

    n16k4, plane q, i8:     [panel][groups*G/4][16 rows][4 inputs] bytes, each the code + 128 (unsigned lanes)
    n16k4, plane q, nibble: [panel][group][G/8 blocks][16 rows][4 inputs] bytes; with block b of a group, the low
                            nibble is input 4*b + i of the group, the high nibble input 4*b + i + G/2.
                            A padding code is the code of value 0 (8 for u4o8; 0 with zero point 0 for u4).
    n16, plane q/w, 8..32 bit: [panel][groups*G inputs][16 rows] items; padding is 0.
    n16, nibble (nf4):      [panel][group][G/2][16 rows] bytes; low nibble input j of the group, high j + G/2.
                            A padding code is 7 (the table's zero).
    planes `scale`, `zero`: per group [panel][group][16 rows]; per row [panel][16 rows]; per tensor [1].
                            Padding rows and groups hold scale 0 and zero point 0.
"""

from __future__ import annotations
