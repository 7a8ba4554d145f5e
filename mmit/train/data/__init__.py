"""From the sources of a run to the tensors of its micro-batches: measured, ordered, loaded."""
