"""`python -m worldvln_edge`: the command line, also where the console script is not on the path."""

from worldvln_edge.cli import main

if __name__ == "__main__":
    main(prog_name="worldvln-edge")
