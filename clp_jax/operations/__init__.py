"""Matrix products in a traced program, loops multiplied out (a compiler's own count sees the body of a loop once).

Counted are ``dot_general`` and convolutions, with the zeros of padding and dilation; everything else is no work for a
matrix unit. What no result depends on is left out, as the compiler leaves it out.
"""

from clp_jax.operations.products import H100, TPU, MatrixUnit, Operations, Product
from clp_jax.operations.program import count, count_operations

__all__ = ["count", "count_operations", "H100", "MatrixUnit", "Operations", "Product", "TPU"]
