"""Published clipping rules, one paper a file, as their authors wrote them."""
