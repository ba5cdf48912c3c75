"""What moves the drone: chunks become bounded velocities, zero when anything is amiss. Apart from inference."""
