"""Measures, simulates, compares and plans memory."""
