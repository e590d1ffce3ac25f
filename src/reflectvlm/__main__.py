"""`python -m reflectvlm`."""

from reflectvlm.cli import command

command()
