"""Calibration: the data pass and the algorithms that turn statistics into scales."""

from bittern.calibration.context import CalibrationContext, Forward
from bittern.calibration.run import run_calibration

__all__ = ["CalibrationContext", "Forward", "run_calibration"]
