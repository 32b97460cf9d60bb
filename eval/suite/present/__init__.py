"""What is drawn and written from `results.json`, and from nothing else."""
