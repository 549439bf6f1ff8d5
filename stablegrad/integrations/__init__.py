"""Other libraries. `import stablegrad` imports none of these modules."""
