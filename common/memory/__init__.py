"""What a run needs of memory, computed before anything is loaded."""
