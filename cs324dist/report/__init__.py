"""The page of one or more runs: one HTML file that needs nothing else."""
