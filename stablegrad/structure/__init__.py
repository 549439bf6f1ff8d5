"""Pieces to build into a network: what keeps its gradients within bounds."""
