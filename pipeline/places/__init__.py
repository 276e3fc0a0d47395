"""Where bytes are kept: folders and object stores, locks on them, and the processes that hold the locks."""
