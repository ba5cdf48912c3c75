"""Measures the bridge: punctuality, and what happens when processes die."""
