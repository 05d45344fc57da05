"""Measurements of where softmax sharing is cheap, what it costs, and what compensation gives back."""
