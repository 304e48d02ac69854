"""What lies on disk: the run's folder, checkpoints, weight files."""
