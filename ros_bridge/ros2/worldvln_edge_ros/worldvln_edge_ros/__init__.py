"""The WorldVLN bridge as a ROS 2 package."""
