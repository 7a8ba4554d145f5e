"""What did the data teach: studies of arms and seeds, with intervals that count both seeds and images."""
