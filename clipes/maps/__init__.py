"""From what a tower saw to activation maps (paper sections 3.1 and 3.3)."""
