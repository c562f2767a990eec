"""Comparisons on equal terms: all runs of an experiment start from one dense network and see the same images."""
