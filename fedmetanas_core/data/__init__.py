"""Datasets, partitions and transforms."""
