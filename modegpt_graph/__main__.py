"""`python -m modegpt_graph` is the command `modegpt-graph`."""

from modegpt_graph.cli import main

if __name__ == "__main__":
    main()
