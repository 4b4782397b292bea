"""Finds the schedules of a checkpoint: full generations are measured, the best schedules searched for and checked."""

from .calibrate import CalibrationError, Plan, calibrate

__all__ = ["CalibrationError", "Plan", "calibrate"]
