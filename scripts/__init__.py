"""One thin file an entry point: each runs as `python -m scripts.NAME`."""
