"""EK-FAC influence functions: factors of the curvature, queries, and pairwise scores."""
