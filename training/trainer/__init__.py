"""The trainer: one loop for all stages, on one process or many, with exact resume."""
