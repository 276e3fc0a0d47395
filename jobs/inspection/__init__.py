"""A cache as text, as a page and as a viewer."""
