"""Scripts for machines with a GPU, and what shows that they work without one."""
