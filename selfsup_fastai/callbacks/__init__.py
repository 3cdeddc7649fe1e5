"""Callbacks that any learner can use, one file each."""
