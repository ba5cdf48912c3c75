"""Flights as MCAP files: written while sessions fly, looked into, replayed, and shown."""
