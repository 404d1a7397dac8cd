"""Matrix products that may be rounded, for estimates that are wanted soon."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def rounded_products() -> Iterator[None]:
    """Within this context CPUs that multiply bfloat16 faster round the factors of float32 matrix products to it.

    Rounding is by 2⁻⁹ at most; sums stay in float32, and products of any other type are as ever.
    """
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before
