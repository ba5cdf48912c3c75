"""Stage 2: group relative policy optimisation (GRPO) on flights in the simulator."""
