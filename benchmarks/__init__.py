"""What is claimed of speed, measured: one command each, one table each, ratios to a named peer in the same run."""
