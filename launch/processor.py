"""What the processor has instructions for."""

import functools
from pathlib import Path


@functools.cache
def processor_flags():
    """Return the names of what the processor can do, on Linux; elsewhere nothing is known."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def emulated(dtype):
    """Whether the processor has no instructions for "bfloat16" or "float16", which makes it slow.

    float16 counts as native to no processor, bfloat16 to all of which nothing is known.
    """
    flags = processor_flags()
    lacking = flags and flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
    return dtype == "float16" or dtype == "bfloat16" and bool(lacking)
