"""The gauntlet: what each method does when training goes wrong, measured."""
