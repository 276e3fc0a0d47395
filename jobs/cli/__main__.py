"""`python -m teachercache.jobs.cli`, for when the command itself is not on the path."""

from teachercache.jobs.cli import main

main()
