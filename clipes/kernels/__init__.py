"""Compiled code, and nothing else. Which of it runs is a rule: ``clipes.kernels.choose``."""
