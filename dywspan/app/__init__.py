"""The compare app: solvers side by side on one prompt and one noise, in a browser."""
