"""From maps to masks and confidence (paper sections 3.3 and 3.4), values, scores."""
