"""Products of matrices whose rows stay in registers while they are summed up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from totalfast.backends.winograd.vectors import (
    CONTRACT,
    FLOAT,
    FLOAT_BYTES,
    INDEX,
    LANES,
    SINGLES,
    VECTOR_BYTES,
    filled,
    load_from,
    store_to,
)
from totalfast.system.loops import jit

if TYPE_CHECKING:
    from numpy.typing import NDArray

VECTORS, ROWS = {16: (2, 8), 8: (2, 6), 4: (4, 4)}[LANES]
"""Vectors in a row and rows of the results that are kept in registers: as many as there are
registers for, and at least as many as there are multiplications on their way."""

BLOCK = VECTORS * LANES
"""Columns of a product that are computed together."""

NARROW = BLOCK // 2 if VECTORS == 2 else BLOCK
"""Columns of the last block of a product, if more are not needed."""


def _product_of_rows(rows, vectors=VECTORS):
    """Build the loop that computes some rows of some vectors of columns."""

    @intrinsic
    def compute(typing_context, a, a_stride, b, c, c_stride, terms, is_first):
        def generate(context, builder, signature, arguments):
            _generate(builder, arguments, rows, vectors)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6, types.boolean), generate

    return compute


def _generate(builder, arguments, rows, vectors):
    a, a_stride, b, c, c_stride, terms, is_first = arguments
    a_rows, c_rows = _rows(builder, a, a_stride, rows), _rows(builder, c, c_stride, rows)
    blocks = {name: builder.append_basic_block(name) for name in ("new", "more", "loop", "end")}
    builder.branch(blocks["new"])
    builder.position_at_end(blocks["new"])
    builder.cbranch(is_first, blocks["loop"], blocks["more"])
    builder.position_at_end(blocks["more"])
    places = [
        builder.add(row, _index(number * VECTOR_BYTES))
        for row in c_rows
        for number in range(vectors)
    ]
    old = [load_from(builder, place, SINGLES, FLOAT_BYTES) for place in places]
    builder.branch(blocks["loop"])

    builder.position_at_end(blocks["loop"])
    term, b_row = builder.phi(INDEX), builder.phi(INDEX)
    sums = [builder.phi(SINGLES) for _ in places]
    for block in (blocks["new"], blocks["more"]):
        term.add_incoming(_index(0), block)
        b_row.add_incoming(b, block)
    for each, value in zip(sums, old, strict=True):
        each.add_incoming(ir.Constant(SINGLES, [0.0] * LANES), blocks["new"])
        each.add_incoming(value, blocks["more"])
    new_sums = _add_one_term(builder, a_rows, term, b_row, sums, vectors)
    next_term = builder.add(term, _index(1))
    term.add_incoming(next_term, blocks["loop"])
    b_row.add_incoming(builder.add(b_row, _index(vectors * VECTOR_BYTES)), blocks["loop"])
    for each, value in zip(sums, new_sums, strict=True):
        each.add_incoming(value, blocks["loop"])
    builder.cbranch(builder.icmp_signed("<", next_term, terms), blocks["loop"], blocks["end"])

    builder.position_at_end(blocks["end"])
    for number, value in enumerate(new_sums):
        row, vector = divmod(number, vectors)
        store_to(
            builder, value, builder.add(c_rows[row], _index(vector * VECTOR_BYTES)), FLOAT_BYTES
        )


def _add_one_term(builder, a_rows, term, b_row, sums, vectors):
    b_vectors = [
        load_from(builder, builder.add(b_row, _index(number * VECTOR_BYTES)), SINGLES, FLOAT_BYTES)
        for number in range(vectors)
    ]
    offset = builder.mul(term, _index(FLOAT_BYTES))
    new_sums = []
    for number, row in enumerate(a_rows):
        factor = filled(builder, load_from(builder, builder.add(row, offset), FLOAT, FLOAT_BYTES))
        for vector, column in enumerate(b_vectors):
            product = builder.fmul(factor, column, flags=CONTRACT)
            old = sums[number * vectors + vector]
            new_sums.append(builder.fadd(product, old, flags=CONTRACT))
    return new_sums


def _rows(builder, address, stride, rows):
    return [builder.add(address, builder.mul(stride, _index(row))) for row in range(rows)]


def _index(number):
    return ir.Constant(INDEX, number)


_most = _product_of_rows(ROWS)
_four = _product_of_rows(4)
_two = _product_of_rows(2)
_one = _product_of_rows(1)

NARROW_VECTORS = NARROW // LANES
NARROW_ROWS = ROWS * BLOCK // NARROW

_most_narrow = _product_of_rows(NARROW_ROWS, NARROW_VECTORS)
_four_narrow = _product_of_rows(4, NARROW_VECTORS)
_one_narrow = _product_of_rows(1, NARROW_VECTORS)


def in_blocks(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Order the columns of ``multiply``'s second matrix: block by block, the last perhaps narrow.

    Parameters
    ----------
    weight
        (..., columns), a multiple of ``NARROW``.

    Returns
    -------
        All blocks (..., ``BLOCK``) one after the other, flat.
    """
    starts = range(0, weight.shape[-1], BLOCK)
    return np.concatenate([weight[..., start : start + BLOCK].ravel() for start in starts])


@jit
def multiply(a, a_stride, b, c, c_stride, rows, columns, terms, is_first):
    """``c = a @ b`` for ``BLOCK`` or ``NARROW`` columns, or ``c += a @ b``.

    Parameters
    ----------
    a, b, c
        Addresses of float32 matrices of (rows, terms), (terms, columns) and (rows, columns). ``b``
        is contiguous.
    a_stride, c_stride
        Bytes from row to row.
    rows, columns, terms
        Sizes, at least one; ``BLOCK`` or ``NARROW`` columns.
    is_first
        False adds to ``c``.
    """
    row = 0
    if columns < BLOCK:
        while row + NARROW_ROWS <= rows:
            _most_narrow(
                a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, terms, is_first
            )
            row += NARROW_ROWS
        while row + 4 <= rows:
            _four_narrow(
                a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, terms, is_first
            )
            row += 4
        while row < rows:
            _one_narrow(
                a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, terms, is_first
            )
            row += 1
        return
    while row + ROWS <= rows:
        _most(a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, terms, is_first)
        row += ROWS
    while row + 4 <= rows:
        _four(a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, terms, is_first)
        row += 4
    if row + 2 <= rows:
        _two(a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, terms, is_first)
        row += 2
    if row < rows:
        _one(a + row * a_stride, a_stride, b, c + row * c_stride, c_stride, terms, is_first)
