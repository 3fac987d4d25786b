"""Derivatives of the operations, for every backend."""
