"""The flight recorder: events on disk, the last steps, and a figure of both."""
