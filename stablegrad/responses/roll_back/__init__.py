"""Roll back: return to a healthy snapshot when trouble lasts."""
