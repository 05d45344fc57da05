"""What a plan would save and cost, from a model's configuration alone; behind `peft-uniattn plan`."""

from .forecast import Forecast, Serving, forecast

__all__ = ["Forecast", "Serving", "forecast"]
