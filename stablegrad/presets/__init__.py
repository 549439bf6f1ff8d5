"""Presets: guards that are ready to use."""
