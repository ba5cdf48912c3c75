"""Evaluation: closed-loop flights in the simulator, their metrics, tables and pictures."""
