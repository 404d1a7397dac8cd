"""Decompositions: plain linear algebra on Gram matrices and weights, float64; no graph, no model."""
