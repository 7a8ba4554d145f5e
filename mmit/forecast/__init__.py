"""The dry run: what a run would take. No run imports it."""
