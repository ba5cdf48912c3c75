"""The robot's topics as a rosbag2 folder (MCAP), for `ros2 bag`, Foxglove and `rosbags`."""
