"""Allocation: scores or error curves to ratios, ratios to whole ranks within a budget."""
