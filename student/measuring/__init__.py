"""How good a finished student is: tasks, likeness to its teachers, linear probes, figures."""
