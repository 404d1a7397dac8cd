"""From traced graphs back to readable Python: forward methods that run in place of a module's own."""
