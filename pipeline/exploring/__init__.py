"""Ways to look at a cache: maps in colours, one sample in a notebook, labelled arrays."""
