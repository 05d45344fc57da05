"""What every method that wraps attention modules shares: its configuration, one wrapped layer, injection."""
