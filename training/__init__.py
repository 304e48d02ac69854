"""What the engine is made of: progress, evaluation, reports."""
