"""The simulator on a robot's topics: camera and odometry out, setpoints in, so that the whole loop runs on a desk."""
