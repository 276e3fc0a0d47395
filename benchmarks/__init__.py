"""Speed, measured: each module prints one table and a line of JSON, ours beside its peers in one run."""
