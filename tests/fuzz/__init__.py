"""Damaged archives, many of them."""
