"""Evaluation: any number of models on any number of benchmarks, from completions that are drawn once and kept."""
