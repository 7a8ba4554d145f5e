"""The memory of a step before there are weights, from shapes: for train.checkpointing=auto and the dry run."""
