"""Variables of the environment that are no fields of a configuration."""

import os
from collections.abc import Mapping

from pagedkv.errors import ConfigError

__all__ = ["OTHER_VARIABLES", "audit_enabled"]

OTHER_VARIABLES = ("PAGEDKV_AUDIT", "PAGEDKV_CACHE_DIR", "PAGEDKV_TRACES")
"""Whether to audit; where models are kept; where benchmarks find traces."""


def audit_enabled(env: Mapping[str, str] | None = None) -> bool:
    """Return whether ``PAGEDKV_AUDIT`` asks for an audit after every step.

    Raises:
        ConfigError: The variable holds something other than 0 or 1.
    """
    value = (os.environ if env is None else env).get("PAGEDKV_AUDIT", "0")
    if value not in ("0", "1", ""):
        raise ConfigError(f"{value!r}", where="PAGEDKV_AUDIT", remedy="set it to 0 or 1")
    return value == "1"
