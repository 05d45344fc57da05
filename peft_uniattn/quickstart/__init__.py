"""What the first run needs on any machine: a small real checkpoint and real instruction data."""
