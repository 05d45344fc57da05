"""`python -m peft_uniattn` is the command line `peft-uniattn`."""

from .cli import app

app()
