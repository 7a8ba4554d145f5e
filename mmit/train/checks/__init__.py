"""What a run finds out before its first step, so that it is refused then and not in the middle."""
