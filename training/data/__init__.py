"""Data of flights: readers, conversions, caches and checks."""
