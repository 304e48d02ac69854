"""From files and folders to batches: lists, samplers, worker processes."""
