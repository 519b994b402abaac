"""Learning results: scripts that hold the full grid of a table and a reduced one, and write the page in `docs/results`."""
