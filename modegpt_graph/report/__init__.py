"""What a person or a program reads about a run: console, HTML, JSON."""
