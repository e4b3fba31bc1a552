"""What a chip is sold as."""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      flops: dense bfloat16 operations per second.
      hbm: bytes that a program may use: what the TPU compiler itself says when one does not fit. A little less than
        what is sold.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second that one link to a neighbour carries in one direction.
      dimensions: of the torus.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int


CHIPS = {
    "v5e": Chip(197e12, int(15.75 * GIB), 819e9, 1600e9 / 8 / 4, 2),
    "v5p": Chip(459e12, int(95.74 * GIB), 2765e9, 4800e9 / 8 / 6, 3),
    "v6e": Chip(918e12, int(31.25 * GIB), 1600e9, 3200e9 / 8 / 4, 2),
}
"""Google's tables (cloud.google.com/tpu/docs, pages v5e, v5p, v6e): peak, bandwidth of the HBM, and of the interchip
interconnect 1600, 4800 and 3200 Gbit/s a chip, which are shared by 4, 6 and 4 links."""

CPU = Chip(1e11, 64 * GIB, 1e10, 1e9, 1)
"""Made up, so that everything can be tried where there is no TPU compiler: ``cpu:8``."""


def interconnect(chip: Chip, shape: tuple[int, ...]) -> float:
    """Bytes per second that can leave a chip of a slice: an axis of two has one link, a longer one two.

    >>> interconnect(CHIPS["v5e"], (2, 4)) / CHIPS["v5e"].link_bandwidth
    3.0
    """
    return chip.link_bandwidth * sum(min(size - 1, 2) for size in shape)
