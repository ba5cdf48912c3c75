"""Benchmarks and soak runs: commands that print tables about speed, memory and load."""
