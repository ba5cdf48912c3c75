"""Simulator environments by the batch: processes of this machine, an HTTP server in front of them, and its client."""
