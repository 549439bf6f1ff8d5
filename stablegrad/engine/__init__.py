"""The engine: how one guarded step runs."""
