"""The parts of students: the base class, stems, routers, heads, and the amalgam of teachers."""
