"""A choice without a branch, for compiled loops."""

from __future__ import annotations

import numba

from totalfast.system.loops import jit


@numba.extending.intrinsic
def choose(typing_context, condition, one, other):
    """``one if condition else other`` without a branch.

    A branch that leaves an array's element unchanged becomes a masked store, which on some
    processors is slower than the rest of the loop.
    """

    def generate(context, builder, signature, arguments):
        return builder.select(*arguments)

    return one(numba.types.boolean, one, one), generate


@jit
def smaller(one, other):
    """The smaller of two numbers, without a branch."""
    return choose(other < one, other, one)
