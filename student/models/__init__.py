"""Parts that students are made of: the base class, stems, routers, heads, and the amalgam of teachers."""
