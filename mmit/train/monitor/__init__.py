"""What a run says about itself: metrics, events, heartbeats, trackers, the report."""
