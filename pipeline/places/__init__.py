"""Where bytes lie: folders and object stores, the locks on them, and the processes that hold those."""
