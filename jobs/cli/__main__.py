"""`python -m teachercache.jobs.cli`, where the command itself is not on the path."""

from teachercache.jobs.cli import main

main()
