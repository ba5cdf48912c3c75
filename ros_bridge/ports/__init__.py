"""Ways to the robot's topics, behind one small interface (`port.py`)."""
