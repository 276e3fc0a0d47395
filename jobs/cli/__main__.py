"""`python -m jobs.cli`, where the command itself is not on the path."""

from jobs.cli import main

main()
