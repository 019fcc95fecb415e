"""Reasoning step by step: cut solutions into steps, and the tables of states and of advantages."""
