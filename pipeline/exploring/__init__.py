"""A cache as it is looked at: maps in colours, one sample in a notebook, labelled arrays."""
