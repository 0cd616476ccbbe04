"""The array types of the control plane."""

import numpy as np
import numpy.typing as npt

__all__ = ["Bool", "Float32", "Float64", "Int32", "Int64", "UInt64"]

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt64 = npt.NDArray[np.uint64]
