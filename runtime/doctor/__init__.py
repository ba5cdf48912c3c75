"""Looks at a computer and says what keeps it from flying, and what to do."""
