"""The commands, one a file: check what was asked, call the API, show the result."""
