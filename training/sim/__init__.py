"""MuJoCo simulator: procedural scenes, a drone with a forward camera, tasks and experts. No torch in here."""
