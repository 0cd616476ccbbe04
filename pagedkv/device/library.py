"""xformers, imported in this one place: its log kept quiet, its absence a typed error."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pagedkv.errors import UnsupportedBackend

__all__ = ["attn_bias", "common", "fmha", "ops", "triton_splitk"]


@contextmanager
def _quietly() -> Iterator[None]:
    """xformers warns in its log wherever its CUDA extension does not fit torch: not news here."""
    logger = logging.getLogger("xformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ImportError as error:
        raise UnsupportedBackend(
            f"xformers cannot be imported ({error})",
            where="device.operators",
            remedy="install pagedkv[torch]",
        ) from error
    finally:
        logger.setLevel(before)


with _quietly():
    from xformers import ops
    from xformers.ops import fmha
    from xformers.ops.fmha import attn_bias, common, triton_splitk
