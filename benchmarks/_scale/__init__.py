"""What a compiled step sends between devices, and what it would on many more."""
