"""`python -m coatnet` is the command `coatnet`."""

from coatnet.cli import main

if __name__ == "__main__":
    main()
