"""Calibration: numbers. Data, activation statistics and solvers that turn a dense weight into a quantized one."""
