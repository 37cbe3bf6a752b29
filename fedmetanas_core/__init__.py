"""Federated neural architecture search: everything that is not Flower."""
