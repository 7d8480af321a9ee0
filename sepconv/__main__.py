"""`python -m sepconv` is the command `sepconv`."""

from sepconv.cli import main

if __name__ == "__main__":
    main()
