"""A comparison before it is made, and who makes it: its stages, about how long they take, the workers."""
